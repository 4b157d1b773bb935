"""Decode steps: dead slots are never read, a core step reads the core, and all implementations agree."""

from __future__ import annotations

import random

import pytest
import torch

from avl_cases import IMAGE_TOKEN, Case, random_case, run_reference, tiny_model
from cache_helpers import NO_STOP_IDS, Replay, compare, greedy, prefill_prompts, replay
from minivlm.cache import attention, state
from minivlm.cache.kv_cache import KVCache
from minivlm.cache.policies import preset
from minivlm.cache.policies.avl import AVLSettings
from minivlm.generation.steps import decode_step
from policies import DECODES, embed, prompt_ids


def random_answers(case: Case) -> list[list[int]]:
    """Random tokens as the answer to each turn, so that every way of running the case is fed the same."""
    rng = random.Random(case.seed)
    return [[rng.randrange(3, IMAGE_TOKEN) for _ in range(turn.answer)] for turn in case.turns]


@pytest.mark.parametrize("how", DECODES)
@pytest.mark.parametrize("block", range(3))
def test_dead_slots_are_never_read(block, how):
    """With NaN in every dead slot before every step and turn, logits and entries are the same to the bit."""
    for seed in range(1000 + block, 1045, 3):
        case = random_case(seed)
        answers = random_answers(case)
        clean, poisoned = (replay(case, answers, poison=poison, **DECODES[how]) for poison in (False, True))
        for call, (ours, expected) in enumerate(zip(poisoned.logits, clean.logits, strict=True)):
            assert torch.equal(ours, expected), (seed, call)
        assert clean.live == poisoned.live and clean.cores == poisoned.cores


def test_poison_shows_where_dead_slots_are_read(monkeypatch):
    """The test above can fail: an attention that multiplies dead values by a weight of zero gives NaN."""

    def careless(q, k, v, live, want_weights):
        weights = (q * k).sum(dim=-1).masked_fill(~live[:, None], -torch.inf).softmax(dim=-1)
        return (weights[..., None, :] @ v), None

    monkeypatch.setattr(attention, "decode_static", careless)
    model = tiny_model(0, heads=(4, 4))
    prompts = [prompt_ids(model, 2, 9, 5)]
    poisoned = Replay(model, AVLSettings().build(3), static=True, poison=True)
    poisoned.turn(embed(model, prompts), [prompts[0] == IMAGE_TOKEN], 4)
    poisoned.step([5])
    assert poisoned.logits[-1].isnan().any()


@pytest.mark.parametrize("block", range(3))
def test_all_implementations_agree(block):
    for seed in range(1100 + block, 1124, 3):
        case = random_case(seed)
        ref = run_reference(case)
        plain, *others = (replay(case, ref.tokens, **options) for options in DECODES.values())
        for other in others:
            tie = compare(other, ref)
            for call in range(min(tie + 1, len(plain.logits))):
                torch.testing.assert_close(other.logits[call], plain.logits[call], atol=1e-4, rtol=1e-4)
            assert other.live[:tie] == plain.live[:tie]


@torch.no_grad()
def test_a_gathering_core_step_reads_the_core_alone(monkeypatch):
    slots_read = []  # by call of `decode_static`, that is by step and layer
    decode_static = attention.decode_static

    def watched(q, k, v, live, want_weights):
        assert k.shape == v.shape and k.shape[2] == live.shape[1]
        slots_read.append(k.shape[2])
        return decode_static(q, k, v, live, want_weights)

    monkeypatch.setattr(attention, "decode_static", watched)
    monkeypatch.setattr(state, "LARGE_BUCKET", 32)
    model = tiny_model(1)
    _, cache = greedy(model, preset("avl"), prompt_ids(model, 3, 300, 9), 3, **DECODES["gathering"])
    assert cache.step_kinds == ["core", "core", "refresh"] and cache.layers[0].counts[0].core == 90
    layout = cache.layers[0].layout
    core_step = 96 + layout.tail  # the core and the system prefix fill a bucket of 96 slots
    assert slots_read == 6 * [core_step] + 3 * [layout.slots]
    assert 96 < layout.tail_start == 160


@pytest.mark.parametrize("how", DECODES)
@torch.no_grad()
def test_what_is_outside_the_core_takes_no_part(how):
    """Garbage in the secondary vision entries changes no core step, and does change a refresh."""
    model = tiny_model(1, heads=(4, 2))
    prompts = [prompt_ids(model, 3, 60, 9), prompt_ids(model, 2, 45, 12, seed=1)]

    def step_logits(garbage: bool) -> list[torch.Tensor]:
        cache = KVCache(model.config.text, preset("avl").build(3), (0, 1), **DECODES[how])
        prefill_prompts(model, cache, prompts, 4)
        for buffers in cache.layers if garbage else ():
            start = torch.tensor([[buffers.layout.tail_start - row.fixed] for row in buffers.counts])
            secondary = (buffers.in_core_step == 0) & (torch.arange(buffers.layout.slots) >= start)
            assert secondary.sum(dim=1).tolist() == [row.vision - row.core for row in buffers.counts] != [0, 0]
            for buffer in (buffers.k, buffers.v):
                buffer.transpose(1, 2)[secondary] = 1e3
        logits = [decode_step(model, cache, torch.tensor([5, 6]), NO_STOP_IDS) for _ in range(3)]
        assert cache.step_kinds == ["core", "core", "refresh"]
        return logits

    clean, dirty = step_logits(garbage=False), step_logits(garbage=True)
    assert torch.equal(clean[0], dirty[0]) and torch.equal(clean[1], dirty[1])
    assert not torch.allclose(clean[2], dirty[2], atol=0.1)
