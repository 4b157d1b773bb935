"""Mistakes of a policy's author: one line names the part at fault, and a refused turn changes nothing."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest

from avl_cases import IMAGE_TOKEN, tiny_model
from cache_helpers import replay_prefill
from contract_policies import Diverse, ShareFilter, SmallKeys, SmallVisionKeys
from minivlm.cache.kv_cache import KVCache
from minivlm.cache.policies.avl import TextH2O
from minivlm.cache.policy import Policy, TokenBudget
from minivlm.errors import UserError
from policies import DECODES, embed, prompt_ids

MODEL = tiny_model(8, layers=3, heads=(4, 2))
PROMPTS = [prompt_ids(MODEL, 3, 40, 9), prompt_ids(MODEL, 2, 22, 20, seed=1)]  # 52 and 44 tokens
IS_VISION = [ids == IMAGE_TOKEN for ids in PROMPTS]


@dataclass
class Unfrozen(TokenBudget):
    share: float
    over: ClassVar = "all"


@dataclass(frozen=True)
class Misspelt(SmallKeys):
    over: ClassVar = "ALL"


KEYS = SmallKeys(0.5)
# What is complained of (trailing spaces tell cases apart), and the parts of a policy.
INCONSISTENT = {
    "budgets are over 'all', 'text' (expected": {"budget": (TextH2O(0.5, 4, 0.7), KEYS)},
    "budgets are over 'ALL' (expected": {"budget": Misspelt(0.5)},
    "intervals 2, 3 (expected the same in every layer)": {"vision": (SmallVisionKeys(0.5, 2), SmallVisionKeys(0.5, 3))},
    "NoneType is no part of a policy": {"budget": (KEYS, None)},
    "Unfrozen is no part of a policy (expected a frozen dataclass)": {"budget": Unfrozen(0.5)},
    "its filters are at layers [2, 2]": {"filters": (ShareFilter(2, 0.5), ShareFilter(2, 0.4))},
    "its filters are at layers [2, 1]": {"filters": (ShareFilter(2, 0.5), ShareFilter(1, 0.4))},
    "its filters are at layers [0]": {"filters": (ShareFilter(0, 0.5),)},
    "the window is 129 queries (expected 1 to 128)": {"window": 129},
    "over all entries excludes": {"budget": KEYS, "vision": SmallVisionKeys(0.5)},
    "over all entries excludes ": {"budget": KEYS, "filters": (ShareFilter(1, 0.5),)},
    "over all entries excludes  ": {"budget": KEYS, "inputs": Diverse(0.5)},
}


@pytest.mark.parametrize("complaint", INCONSISTENT)
def test_parts_that_do_not_fit_together(complaint):
    with pytest.raises(UserError) as error:
        Policy("wrong", **INCONSISTENT[complaint])
    assert complaint.strip() in str(error.value) and str(error.value).startswith("policy 'wrong': ")


def test_parts_that_do_not_fit_the_model():
    selections, budgets = (SmallVisionKeys(0.5),) * 2, (KEYS,) * 4
    for count, parts in ((2, {"vision": selections}), (4, {"budget": budgets}), (0, {"budget": ()})):
        with pytest.raises(UserError, match=f"policy 'short' has parts for {count} layers, the model has 3"):
            KVCache(MODEL.config.text, Policy("short", **parts))
    with pytest.raises(UserError, match="policy 'deep' has a filter at layer 4, the model has 3 layers"):
        KVCache(MODEL.config.text, Policy("deep", filters=(ShareFilter(4, 0.5),)))


@dataclass(frozen=True)
class Mistaken(TokenBudget):
    """A budget that returns something wrong, which `mistake` names."""

    mistake: str
    over: ClassVar = "all"

    def limits(self, before, answer):
        wrong = {
            "falls": (max(before - answer, 0), 0),
            "protects too much": (5, 6),
            "negative": (-1, 0),
            "float": (4.0, 0),
            "one number": 5,
            "in a later turn": (30, 31) if before > 60 else (30, 0),
        }
        return wrong.get(self.mistake, (10, 0))

    def first_scores(self, entries):
        scores = super().first_scores(entries)
        if self.mistake == "half":
            return scores.half()
        return scores[..., :1] if self.mistake == "narrow" else scores

    def prompt_queries(self):
        return "all"

    def score_prompt(self, scores, attn, own):
        return scores.double() if self.mistake == "double" else scores

    def score_step(self, scores, attn, live, new):
        return attn.mean(dim=1) if self.mistake == "no heads" else scores


# The mistake, and what is complained of.
MISTAKES = {
    "falls": "Mistaken.limits falls from 52 to 51 at answer 1",
    "protects too much": "Mistaken.limits(52, 0) is (5, 6) (expected how many entries stay",
    "negative": "Mistaken.limits(52, 0) is (-1, 0)",
    "float": "Mistaken.limits(52, 0) is (4.0, 0)",
    "one number": "Mistaken.limits(52, 0) is 5",
    "half": "Mistaken.first_scores returned torch.float16 [2, 52] (expected torch.float32 [2, 52])",
    "narrow": "Mistaken.first_scores returned torch.float32 [2, 1] (expected torch.float32 [2, 52])",
    "double": "Mistaken.score_prompt returned torch.float64 [2, 52] (expected torch.float32 [2, 52])",
    "no heads": "Mistaken.score_step returned torch.float32 [2, T] (expected torch.float32 [2, 2, T])",
}


@pytest.mark.parametrize("how", DECODES)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_of_a_budget(mistake, how):
    with pytest.raises(UserError) as error:
        replay_prefill(MODEL, Policy("mistaken", budget=Mistaken(mistake)), PROMPTS, 9, **DECODES[how]).step([5, 6])
    tail = "256" if how == "gathering" else "32"  # slots
    assert MISTAKES[mistake].replace("T]", f"{tail}]") in str(error.value)


@dataclass(frozen=True)
class WrongVision(SmallVisionKeys):
    mistake: str = ""

    def counts(self, prompt):
        counts = super().counts(prompt)
        return counts._replace(core=-1) if self.mistake == "negative" else counts

    def scores(self, candidates):
        scores = super().scores(candidates)
        return scores.bfloat16() if self.mistake == "bfloat16" else scores

    def core_scores(self, candidates, scores):
        return None if self.mistake == "none" else candidates.attn


@dataclass(frozen=True)
class WrongFilter(ShareFilter):
    def scores(self, candidates):
        return candidates.attn[:-1]


@dataclass(frozen=True)
class WrongInputs(Diverse):
    def scores(self, embeds, count):
        return super().scores(embeds, count).long()


# What is complained of, and the parts of a policy.
CHOICES = {
    "WrongVision.counts returned -1, 20 (expected integers from 0 up)": {
        "vision": WrongVision(0.5, mistake="negative")
    },
    "WrongVision.scores returned torch.bfloat16 [40]": {"vision": WrongVision(0.5, mistake="bfloat16")},
    "WrongVision.core_scores returned NoneType": {"vision": WrongVision(0.5, mistake="none")},
    "WrongFilter.scores returned torch.float32 [39]": {"filters": (WrongFilter(1, 0.5),)},
    "WrongInputs.scores returned torch.int64 [40]": {"inputs": WrongInputs(0.5)},
}


@pytest.mark.parametrize("complaint", CHOICES)
def test_mistakes_of_parts_that_choose_image_entries(complaint):
    with pytest.raises(UserError) as error:
        replay_prefill(MODEL, Policy("mistaken", **CHOICES[complaint]), PROMPTS, 9)
    assert complaint in str(error.value)


def test_limits_that_are_refused_in_a_later_turn_change_nothing():
    replayed = replay_prefill(MODEL, Policy("later", budget=Mistaken("in a later turn")), PROMPTS, 9)
    replayed.step([5, 6])
    before = [replace(sequence) for sequence in replayed.cache.sequences]
    with pytest.raises(UserError, match=r"is \(30, 31\)"):
        replayed.turn(embed(MODEL, PROMPTS), IS_VISION, 4)
    assert replayed.cache.sequences == before and replayed.cache.num_turns == 1
    replayed.step([7, 8])
    assert replayed.lengths[-1] == [len(ids) + 2 for ids in PROMPTS]
