"""A ragged batch gives what its sequences give alone: decisions, logits, answers; and what has finished stays as it is."""

from __future__ import annotations

import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import tiny
import weights
from avl_cases import Case, Turn, random_prompt, random_settings, run, tiny_model
from cache_helpers import Player, compare, play, policy_of
from cli_helpers import write_pages
from minivlm import Request, Sampling
from minivlm.cache.kv_cache import KVCache
from minivlm.generation.generate import Generation
from policies import DECODES, POLICIES, image_features, prompt_ids

BATCH = 5


def random_batch(seed: int) -> list[Case]:
    """Five sequences of two turns each, under one model and settings; some turns without an image, answers of all lengths."""
    rng = random.Random(seed)
    layers = rng.randint(2, 3)
    model = tiny_model(rng.randrange(2**31), layers, heads=rng.choice(((4, 4), (4, 2), (6, 2))))
    settings = random_settings(rng, layers)
    return [
        Case(
            seed,
            model,
            settings,
            tuple(Turn(*random_prompt(rng, model, first=i == 0), rng.choice((1, 4, 9))) for i in range(2)),
        )
        for _ in range(BATCH)
    ]


class Rows:
    """Which calls of a batch were each sequence's own, for those that have finished wait for the others."""

    def __init__(self, player: Player) -> None:
        self.player = player
        self.calls: list[list[int]] = [[] for _ in range(BATCH)]

    def note(self) -> None:
        for b, calls in enumerate(self.calls):
            if self.player.cache.active[b]:
                calls.append(len(self.player.logits) - 1)

    def row(self, b: int) -> SimpleNamespace:
        """Sequence b's calls alone, as a `Player` has them."""
        player, calls = self.player, self.calls[b]
        return SimpleNamespace(
            cache=player.cache,
            logits=[player.logits[call][b : b + 1] for call in calls],
            held=[[player.held[call][b]] for call in calls],
            seen=[[player.seen[call][b]] for call in calls],
            cores=[(calls.index(call), [chosen[b]]) for call, chosen in player.cores if call in calls],
        )


def play_batch(cases: list[Case], tokens: list[list[list[int]]], **options) -> Rows:
    """All sequences at once, with tokens[b][turn] as their answers; each finishes where its own answer ends."""
    model, image = cases[0].model, cases[0].model.config.image_token_index
    player = Player(model, policy_of(cases[0].settings, model.config.text.num_hidden_layers), batch=BATCH, **options)
    rows = Rows(player)
    for i in range(2):
        last = [answers[i - 1][-1:] if i else [] for answers in tokens]
        embeds = [
            torch.cat(
                (model.language_model.embed_tokens(torch.tensor(unfed, dtype=torch.int64)), case.embeds(case.turns[i]))
            )
            for case, unfed in zip(cases, last)
        ]
        ids = [
            torch.cat((torch.tensor(unfed, dtype=torch.int64), case.turns[i].token_ids))
            for case, unfed in zip(cases, last)
        ]
        player.turn(embeds, [row == image for row in ids], max(len(answers[i]) for answers in tokens))
        rows.note()
        for step in range(max(len(answers[i]) for answers in tokens) - 1):
            for b, answers in enumerate(tokens):
                player.cache.active[b] &= step < len(answers[i]) - 1
            player.step([answers[i][step] if step < len(answers[i]) else 0 for answers in tokens])
            rows.note()
    return rows


@pytest.mark.parametrize("seed", range(12))
def test_decisions_and_logits_are_those_of_single_runs(seed):
    """Against the re-statement and against the cache with each sequence alone; the second turn continues a ragged batch."""
    cases = random_batch(3000 + seed)
    refs = [run(case) for case in cases]
    rows = play_batch(cases, [ref.tokens for ref in refs], **list(DECODES.values())[seed % 3])
    for b, (case, ref) in enumerate(zip(cases, refs)):
        alone, ours = play(case, ref.tokens), rows.row(b)
        assert len(ours.logits) == len(alone.logits) == len(ref.logits)
        tie = compare(ours, ref)
        for call in range(min(tie + 1, len(alone.logits))):
            torch.testing.assert_close(ours.logits[call], alone.logits[call], atol=1e-4, rtol=0)
        assert ours.held[:tie] == alone.held[:tie]


class Frozen:
    """An observer: nothing of a finished sequence may change any more."""

    def prefilled(self, cache, run):
        self.before = [[buffer[b].clone() for buffer in self.rows(cache)] for b in range(BATCH)]
        self.checked = 0

    def stepped(self, cache):
        now = [[buffer[b].clone() for buffer in self.rows(cache)] for b in range(BATCH)]
        for b, (old, new) in enumerate(zip(self.before, now)):
            same = all(map(torch.equal, old, new))
            assert same == (not cache.active[b]), (b, cache.steps)
            self.checked += same
        self.before = now

    @staticmethod
    def rows(cache):
        for layer in cache.layers:
            yield from (buffer for buffer in layer.tensors() if buffer is not layer._bounds)
        yield cache.stored


@pytest.mark.parametrize("how", DECODES)
@pytest.mark.parametrize("name", POLICIES)
def test_answers_that_end_at_different_times(name, how):
    """Sampled answers with several end-of-sequence ids: as alone, and a finished sequence writes nothing."""
    model = tiny_model(11, heads=(4, 2))
    ids = [
        prompt_ids(model, *parts, seed=i)
        for i, parts in enumerate([(3, 20, 9), (1, 33, 2, 7, 30), (6,), (2, 5, 1), (8, 40, 15)])
    ]

    def answer(rows: range, ends: bool, observer=None) -> Generation:
        cache = KVCache(model.config.text, POLICIES[name].build(3), rows, **DECODES[how])
        features = [f for i in rows for f in image_features(model, ids[i], seed=i)]
        sampling = Sampling(14, temperature=1.0, top_p=0.9, seed=1, ignore_eos=not ends)
        generation = Generation(model, cache, [ids[i] for i in rows], features, sampling, observer)
        list(generation)
        return generation

    endless = answer(range(BATCH), ends=False)
    model.config = replace(
        model.config, eos_token_ids=tuple(endless.tokens[b][step] for b, step in ((0, 3), (1, 7), (2, 11)))
    )
    frozen = Frozen()
    batch = answer(range(BATCH), ends=True, observer=frozen)
    assert len({len(tokens) for tokens in batch.tokens}) > 2 and "stop" in batch.finish and frozen.checked > 5
    for b in range(BATCH):
        alone = answer(range(b, b + 1), ends=True)
        assert (alone.tokens[0], alone.finish[0]) == (batch.tokens[b], batch.finish[b])
        assert alone.cache.stored[0] == batch.cache.stored[b] == len(batch.tokens[b]) - 1
        assert alone.unfed(0) == batch.unfed(b) == batch.tokens[b][-1:]
    assert endless.finish == ["length"] * BATCH and {len(tokens) for tokens in endless.tokens} == {14}


@pytest.mark.parametrize("name", ["avl, h2o text, filter", "avl, history text, window", "streaming", "random"])
def test_ask_batch(name, tmp_path):
    vlm = weights.load(tiny.write(tmp_path / "model"), device="cpu")
    pages = write_pages(tmp_path)
    requests = [
        Request("What?", pages[:1], sample=4), Request("And why is that so?", pages), Request("No page.", sample=9),
        Request("a <image> b <image> c", pages, sample=2), Request("?", pages[1:]),
    ]  # fmt: skip
    sampling = Sampling(10, temperature=0.7, seed=3)
    for request, answer in zip(requests, vlm.ask_batch(requests, sampling=sampling, settings=POLICIES[name])):
        (alone,) = vlm.ask_batch([request], sampling=sampling, settings=POLICIES[name])
        assert (answer.text, answer.token_ids, answer.finish) == (alone.text, alone.token_ids, alone.finish)
