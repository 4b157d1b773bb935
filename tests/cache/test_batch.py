"""Each row of a ragged batch gets what it gets alone: decisions, logits and answers. A finished row stays as it is."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch

import tiny
import weights
from avl_cases import Case, Turn, random_prompt, random_settings, run_reference, tiny_model
from cache_helpers import Replay, compare, policy_of_reference, replay
from cli_helpers import write_pages
from minivlm import Request, Sampling
from minivlm.cache.kv_cache import KVCache
from minivlm.generation.generate import Generation
from policies import DECODES, POLICIES, image_features, prompt_ids

BATCH = 5


def random_batch(seed: int) -> list[Case]:
    """Five conversations of two turns with one model and one group of settings.

    Some turns have no image, and the answers differ in length.
    """
    rng = random.Random(seed)
    layers = rng.randint(2, 3)
    model = tiny_model(rng.randrange(2**31), layers, heads=rng.choice(((4, 4), (4, 2), (6, 2))))
    settings = random_settings(rng, layers)

    def random_turn(first: bool) -> Turn:
        return Turn(*random_prompt(rng, model, first), answer=rng.choice((1, 4, 9)))

    return [Case(seed, model, settings, (random_turn(first=True), random_turn(first=False))) for _ in range(BATCH)]


def replay_batch(cases: Sequence[Case], answers: Sequence[Sequence[list[int]]], **options: bool) -> list[Replay]:
    """All conversations in one batch, with answers[row][turn]; returns each row with its own calls alone.

    A row finishes where its own answer ends, and then waits for the others.
    """
    model = cases[0].model
    policy = policy_of_reference(cases[0].settings, model.config.text.num_hidden_layers)
    batch = Replay(model, policy, batch=len(cases), **options)
    own_calls: list[list[int]] = [[] for _ in cases]

    def note_active() -> None:
        for row, calls in enumerate(own_calls):
            if batch.cache.active[row]:
                calls.append(len(batch.logits) - 1)

    for turn_idx in range(2):
        answer_lengths = [len(of_row[turn_idx]) for of_row in answers]
        inputs = [case.inputs(turn_idx, of_row) for case, of_row in zip(cases, answers, strict=True)]
        batch.turn([embeds for embeds, _ in inputs], [is_vision for _, is_vision in inputs], max(answer_lengths))
        note_active()
        for step in range(max(answer_lengths) - 1):
            for row, length in enumerate(answer_lengths):
                batch.cache.active[row] &= step < length - 1
            batch.step([of_row[turn_idx][step] if step < len(of_row[turn_idx]) else 0 for of_row in answers])
            note_active()
    return [batch.only(row, calls) for row, calls in enumerate(own_calls)]


@pytest.mark.parametrize("seed", range(12))
def test_decisions_and_logits_are_those_of_single_runs(seed):
    """Against the re-statement and against each row alone on the cache; the second turn continues a ragged batch."""
    cases = random_batch(3000 + seed)
    refs = [run_reference(case) for case in cases]
    rows = replay_batch(cases, [ref.tokens for ref in refs], **list(DECODES.values())[seed % 3])
    for case, ref, ours in zip(cases, refs, rows, strict=True):
        alone = replay(case, ref.tokens)
        assert len(ours.logits) == len(alone.logits) == len(ref.logits)
        tie = compare(ours, ref)
        for call in range(min(tie + 1, len(alone.logits))):
            torch.testing.assert_close(ours.logits[call], alone.logits[call], atol=1e-4, rtol=0)
        assert ours.live[:tie] == alone.live[:tie]


class FrozenCheck:
    """An observer that asserts after each step that a finished row has not changed, and that the others have.

    What stands where the next token would go does not count.
    """

    def prefilled(self, cache: KVCache, prefill: object) -> None:
        self.before = self.copies(cache)
        self.checked = 0

    def stepped(self, cache: KVCache) -> None:
        now = self.copies(cache)
        for row, (old, new) in enumerate(zip(self.before, now, strict=True)):
            unchanged = all(torch.equal(a, b) for a, b in zip(old, new, strict=True))
            assert unchanged == (not cache.active[row]), (row, cache.steps)
            self.checked += unchanged
        self.before = now

    @classmethod
    def copies(cls, cache: KVCache) -> list[list[torch.Tensor]]:
        return [list(cls.of_row(cache, row)) for row in range(BATCH)]

    @staticmethod
    def of_row(cache: KVCache, row: int) -> Iterator[torch.Tensor]:
        for buffers, place in zip(cache.layers, cache.next_place[:, row].clone(), strict=True):
            yield place
            for tensor in buffers.tensors():
                copy = tensor[row].clone()
                if any(tensor is each for each in (buffers.k, buffers.v, buffers.position)):
                    copy[torch.arange(len(place)), buffers.layout.tail_start + place] = 0
                yield copy
        yield cache.stored[row].clone()


@pytest.mark.parametrize("how", DECODES)
@pytest.mark.parametrize("name", POLICIES)
def test_answers_that_end_at_different_times(name, how):
    """Sampled answers with several end-of-sequence ids are those of each row alone; a finished row writes nothing."""
    model = tiny_model(11, heads=(4, 2))
    parts = [(3, 20, 9), (1, 33, 2, 7, 30), (6,), (2, 5, 1), (8, 40, 15)]
    prompts = [prompt_ids(model, *counts, seed=i) for i, counts in enumerate(parts)]

    def answer(rows: range, ends: bool, observer: FrozenCheck | None = None) -> Generation:
        cache = KVCache(model.config.text, POLICIES[name].build(3), rows, **DECODES[how])
        features = [image for row in rows for image in image_features(model, prompts[row], seed=row)]
        sampling = Sampling(14, temperature=1.0, top_p=0.9, seed=1, ignore_eos=not ends)
        generation = Generation(model, cache, [prompts[row] for row in rows], features, sampling, observer)
        list(generation)
        return generation

    endless = answer(range(BATCH), ends=False)
    ends = tuple(endless.tokens[row][step] for row, step in ((0, 3), (1, 7), (2, 11)))
    model.config = replace(model.config, eos_token_ids=ends)
    frozen = FrozenCheck()
    batch = answer(range(BATCH), ends=True, observer=frozen)
    assert len({len(tokens) for tokens in batch.tokens}) > 2
    assert "stop" in batch.finish and frozen.checked > 5
    for row in range(BATCH):
        alone = answer(range(row, row + 1), ends=True)
        assert (alone.tokens[0], alone.finish[0]) == (batch.tokens[row], batch.finish[row])
        assert alone.cache.stored[0] == batch.cache.stored[row] == len(batch.tokens[row]) - 1
        assert alone.unfed(0) == batch.unfed(row) == batch.tokens[row][-1:]
    assert endless.finish == ["length"] * BATCH
    assert {len(tokens) for tokens in endless.tokens} == {14}


@pytest.mark.parametrize("name", ["avl, h2o text, filter", "avl, history text, window", "streaming", "random"])
def test_ask_batch(name, tmp_path):
    vlm = weights.load(tiny.write(tmp_path / "model"), device="cpu")
    pages = write_pages(tmp_path)
    requests = [
        Request("What?", pages[:1], sample=4),
        Request("And why is that so?", pages),
        Request("No page.", sample=9),
        Request("a <image> b <image> c", pages, sample=2),
        Request("?", pages[1:]),
    ]
    options = dict(sampling=Sampling(10, temperature=0.7, seed=3), settings=POLICIES[name])
    for request, answer in zip(requests, vlm.ask_batch(requests, **options), strict=True):
        (alone,) = vlm.ask_batch([request], **options)
        assert (answer.text, answer.token_ids, answer.finish) == (alone.text, alone.token_ids, alone.finish)
