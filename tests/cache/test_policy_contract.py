"""What the contract of a policy can say beyond the shipped policies, against plain re-statements.

That is: parts that differ by layer and head, scores from keys, eviction once or at every step, and filters at several
layers and before the decoder.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from avl_cases import IMAGE_TOKEN, tiny_model
from cache_helpers import Replay, replay_prefill
from contract_policies import Diverse, DropSettings, PyramidWindowSettings, ShareFilter, SmallKeys, SmallVisionKeys
from minivlm.cache.decode_pass import DecodePass
from minivlm.cache.kv_cache import KVCache
from minivlm.cache.policy import Policy, Prompt
from minivlm.cache.prefill_pass import PrefillPass
from minivlm.generation.steps import prefill_logits
from policies import DECODES, embed, prompt_ids

LAYERS = 3
HEADS = 2  # key/value heads
MODEL = tiny_model(8, layers=LAYERS, heads=(4, HEADS))
PROMPTS = [prompt_ids(MODEL, 3, 40, 9), prompt_ids(MODEL, 2, 22, 20, seed=1)]
IS_VISION = [ids == IMAGE_TOKEN for ids in PROMPTS]
VISION = [mask.nonzero()[:, 0].tolist() for mask in IS_VISION]  # positions of each prompt's image tokens
OTHERS = [(~mask).nonzero()[:, 0].tolist() for mask in IS_VISION]  # and of its other tokens


@pytest.fixture
def projected(monkeypatch) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Queries and keys of every layer of a prefill, then of every layer of each step."""
    seen = []
    for owner in (PrefillPass, DecodePass):

        def attend(self, layer_idx, q, k, v, plain=owner.attend):
            seen.append((q, k))
            return plain(self, layer_idx, q, k, v)

        monkeypatch.setattr(owner, "attend", attend)
    return seen


def causal_attention(q: torch.Tensor, k: torch.Tensor, row: int, length: int) -> torch.Tensor:
    """Attention weights [H, S, S] of one row of a prefill, in float64."""
    keys = k[row, :, :length].double().repeat_interleave(q.shape[1] // k.shape[1], dim=0)
    scores = q[row, :, :length].double() @ keys.transpose(1, 2) / q.shape[-1] ** 0.5
    return scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf).softmax(dim=-1)


def test_a_budget_that_differs_by_layer_and_head_and_evicts_once(projected):
    replayed = replay_prefill(MODEL, PyramidWindowSettings(capacity=30, window=4).build(LAYERS), PROMPTS, 9)
    for layer_idx, (q, k) in enumerate(projected):
        for row, ids in enumerate(PROMPTS):
            n, capacity = len(ids), 30 - 6 * layer_idx
            attn = causal_attention(q, k, row, n)[:, -4:].sum(dim=1).view(HEADS, 2, n).sum(dim=1)  # [H_kv, S]
            for head in range(HEADS):
                pooled = [float(attn[head, max(i - 1, 0) : i + 2].max()) for i in range(n)]
                best = sorted(range(n - 4), key=pooled.__getitem__, reverse=True)[: capacity - 4]
                assert replayed.live[0][row][layer_idx][head] == {*best, *range(n - 4, n)}
    assert any(first != second for row in replayed.live[0] for first, second in row)  # the heads differ
    for step in range(8):
        replayed.step([5, 6])
        for row, ids in enumerate(PROMPTS):
            answer = set(range(len(ids), len(ids) + step + 1))
            for layer_idx in range(LAYERS):
                after_prefill = replayed.live[0][row][layer_idx]
                assert replayed.live[-1][row][layer_idx] == [head | answer for head in after_prefill]


@pytest.mark.parametrize("how", DECODES)
def test_a_budget_that_scores_by_keys_at_every_step(how, projected):
    replayed = replay_prefill(MODEL, Policy("keys", budget=SmallKeys(0.5)), PROMPTS, 9, **DECODES[how])
    norms: dict[tuple[int, int, int, int], float] = {}  # of keys, by layer, row, head and position

    def note_norms(first_positions: list[int]) -> None:
        """Those of the last call, given the position of each row's first new token; those of padding go unread."""
        for layer_idx, (_, k) in enumerate(projected[-LAYERS:]):
            for row, first in enumerate(first_positions):
                for head, of_head in enumerate(k[row].norm(dim=-1).tolist()):
                    norms.update({(layer_idx, row, head, first + i): norm for i, norm in enumerate(of_head)})

    note_norms([0, 0])
    for step in range(8):
        replayed.step([5, 6])
        new_positions = [len(ids) + step for ids in PROMPTS]
        note_norms(new_positions)
        for layer_idx in range(LAYERS):
            for row, new in enumerate(new_positions):
                for head in range(HEADS):
                    candidates = replayed.live[-2][row][layer_idx][head] | {new}
                    by_norm = sorted((norms[layer_idx, row, head, position], position) for position in candidates)
                    kept = {position for _, position in by_norm[: (new + 1) // 2]}
                    assert replayed.live[-1][row][layer_idx][head] == kept


def test_a_selection_that_differs_by_layer_and_scores_by_keys(projected):
    """The core is still chosen by attention."""
    shares = (0.6, 0.4, 0.2)
    replayed = replay_prefill(MODEL, Policy("keys", vision=tuple(map(SmallVisionKeys, shares))), PROMPTS, 9)
    for share, layer_idx, (q, k) in zip(shares, range(LAYERS), projected, strict=True):
        for row, ids in enumerate(PROMPTS):
            count = int(share * len(VISION[row]))
            norms = k[row].norm(dim=-1).mean(dim=0).tolist()
            kept = sorted(VISION[row], key=norms.__getitem__)[:count]
            assert replayed.live[0][row][layer_idx] == [{*kept, *OTHERS[row]}] * HEADS
            attn = causal_attention(q, k, row, len(ids))[:, -1].mean(dim=0).tolist()
            core = sorted(kept, key=attn.__getitem__, reverse=True)[: count // 2]
            assert replayed.cores[0][row][layer_idx] == set(core)


def test_filters_at_two_layers(projected):
    policy = Policy("pyramid drop", filters=(ShareFilter(1, 0.5), ShareFilter(2, 0.2)))
    replayed = replay_prefill(MODEL, policy, PROMPTS, 9)
    for row, ids in enumerate(PROMPTS):
        tokens = list(range(len(ids)))
        for layer_idx, share in enumerate((0.5, 0.2)):
            assert replayed.live[0][row][layer_idx] == [set(tokens)] * HEADS
            attn = causal_attention(*projected[layer_idx], row, len(tokens))[:, -1].mean(dim=0)
            attn_of = dict(zip(tokens, attn.tolist(), strict=True))
            vision = sorted(set(tokens) - set(OTHERS[row]), key=attn_of.__getitem__, reverse=True)
            tokens = sorted([*OTHERS[row], *vision[: int(share * len(VISION[row]))]])
        assert replayed.live[0][row][2] == [set(tokens)] * HEADS


@pytest.mark.parametrize("how", DECODES)
@torch.no_grad()
def test_a_filter_before_the_decoder(how):
    """As if the dropped tokens had never been there, except that the others keep their positions."""
    replayed = replay_prefill(MODEL, Policy("diverse", inputs=Diverse(0.3)), PROMPTS, 9, **DECODES[how])
    for _ in range(3):
        replayed.step([5, 6])
    for row, ids in enumerate(PROMPTS):
        embeds, count = embed(MODEL, PROMPTS)[row], int(0.3 * len(VISION[row]))
        best = Diverse(0.3).scores(embeds[VISION[row]], count).topk(count).indices.tolist()
        tokens = sorted([*(VISION[row][i] for i in best), *OTHERS[row]])
        assert replayed.live[0][row] == [[set(tokens)] * HEADS] * LAYERS

        # The tokens that are left and the answer, prefilled at their positions into a full cache.
        answer = MODEL.language_model.embed_tokens(torch.tensor([[5, 6][row]] * 3))
        positions = torch.tensor([*tokens, *range(len(ids), len(ids) + 3)])
        full = KVCache(MODEL.config.text, Policy("full"))
        (prefill,) = full.prefill([torch.zeros(len(positions), dtype=torch.bool)], 1)
        expected = MODEL.lm_head(MODEL(torch.cat((embeds[tokens], answer))[None], positions[None], prefill)[0])
        ours = torch.stack([logits[row] for logits in replayed.logits])
        torch.testing.assert_close(ours, expected[len(tokens) - 1 :], atol=1e-4, rtol=0)


def test_the_greedy_choice_is_diverse():
    """Given two tight clusters and one outlier, three choices take one token from each."""
    generator = torch.Generator().manual_seed(0)
    clusters = torch.tensor([0, 0, 0, 1, 1, 2])
    embeds = torch.eye(3)[clusters] + 0.01 * torch.randn(6, 3, generator=generator)
    best = Diverse(0.5).scores(embeds, 3).topk(3).indices
    assert set(clusters[best].tolist()) == {0, 1, 2}


@pytest.mark.parametrize("settings", [DropSettings(), PyramidWindowSettings()], ids=lambda settings: settings.policy)
@pytest.mark.parametrize("how", DECODES)
def test_batches_and_turns(settings, how):
    """In two turns, each row of a ragged batch gets what it gets alone, whichever way its steps are run."""
    unfed = torch.tensor([7])
    second_turn = [torch.cat((unfed, prompt_ids(MODEL, 2, 12 + 5 * row, 6, seed=9 + row))) for row in range(2)]

    def replay_logits(rows: list[int]) -> list[torch.Tensor]:
        replayed = Replay(MODEL, settings.build(LAYERS), batch=len(rows), **DECODES[how])
        for prompts in (PROMPTS, second_turn):
            embeds = embed(MODEL, prompts)
            replayed.turn([embeds[row] for row in rows], [prompts[row] == IMAGE_TOKEN for row in rows], 6)
            for token in range(10, 15):
                replayed.step([token + row for row in rows])
        return replayed.logits

    both = replay_logits([0, 1])
    for row in range(2):
        for ours, alone in zip(both, replay_logits([row]), strict=True):
            torch.testing.assert_close(ours[row], alone[0], atol=1e-4, rtol=0)


def test_a_policy_knows_what_reaches_a_layer():
    policy, prompt = DropSettings().build(3), Prompt(length=120, vision=100)
    assert [policy.vision_tokens(prompt, layer_idx) for layer_idx in range(3)] == [80, 60, 30]
    assert replace(policy, filters=()).vision_tokens(prompt, 2) == 80
    assert Policy("full").vision_tokens(prompt, 2) == 100


@torch.no_grad()
def test_a_prompt_without_an_image_passes_an_input_filter():
    ids = prompt_ids(MODEL, 9)
    embeds = embed(MODEL, [ids])[0][None]
    logits = []
    for policy in (Policy("diverse", inputs=Diverse(0.5)), Policy("full")):
        (prefill,) = KVCache(MODEL.config.text, policy).prefill([ids == IMAGE_TOKEN], 4)
        logits.append(prefill_logits(MODEL, prefill, embeds))
    assert torch.equal(*logits)
