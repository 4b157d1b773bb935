"""torch.compile of the decode step: one whole graph per kind of step and one for the choice of cores, reused from step to step and prompt to prompt."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from avl_cases import tiny_model
from minivlm.cache.buffers import choose_cores
from minivlm.cache.kv_cache import KVCache
from minivlm.generation.compile import compiled_blocks, compiled_decode_step
from minivlm.generation.steps import decode_step, forward_step, prefill_step
from policies import DECODES, POLICIES, image_features, needs_compiler, prompt_ids

MODEL = tiny_model(1, layers=2)
# Two prompts of each batch; counts differ, but all fall into the same buckets of 32 slots.
PROMPTS = [[(3, 90, 12), (2, 84, 9)], [(4, 86, 11), (1, 90, 14)], [(3, 88, 1, 2, 9), (2, 81, 12)]]


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@torch.no_grad()
def answer(cache: KVCache, parts, step, steps: int = 7) -> tuple[torch.Tensor, set[str]]:
    """Logits [steps + 1, B, V] of a new batch in `cache`, and the kinds of steps taken; its second sequence ends early."""
    cache.reset(range(len(parts)))
    ids = [prompt_ids(MODEL, *counts, seed=i) for i, counts in enumerate(parts)]
    logits = [prefill_step(MODEL, cache, ids, [f for row in ids for f in image_features(MODEL, row)], steps + 1)]
    for i in range(steps):
        token = torch.tensor([10 + i, 2 if i == 4 else 30 + i])
        logits.append(step(MODEL, cache, token, torch.tensor([2])).clone())
    return torch.stack(logits), set(cache.step_kinds)


def counted_step(counter: CompileCounter) -> Callable:
    """A decode step in graphs that `counter` counts, split as the library splits it."""
    forward, choose = (
        torch.compile(part, fullgraph=True, dynamic=False, backend=counter) for part in (forward_step, choose_cores)
    )
    return partial(decode_step, forward=forward, choose=choose)


QUICK = ("full", "avl, h2o text, filter", "avl, history text, window", "streaming")


@pytest.mark.parametrize("how", ["static", "gathering"])
@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in POLICIES]
)
def test_one_graph_for_each_kind_of_step(name, how):
    counter = CompileCounter()
    compiled = counted_step(counter)
    policy = POLICIES[name].build(2)
    reused = KVCache(MODEL.config.text, policy, (0, 1), **DECODES[how])
    for parts in PROMPTS:
        fresh = KVCache(MODEL.config.text, policy, (0, 1), **DECODES[how])
        plain, kinds = answer(KVCache(MODEL.config.text, policy, (0, 1)), parts, decode_step)
        for cache in (reused, fresh):  # other buffers of the same bucket are no reason to compile again
            logits, _ = answer(cache, parts, compiled)
            torch.testing.assert_close(logits[:, 0], plain[:, 0], atol=1e-4, rtol=0)
            torch.testing.assert_close(logits[:5, 1], plain[:5, 1], atol=1e-4, rtol=0)
            assert counter.frame_count == len(kinds) + ("refresh" in kinds)
    assert counter.op_count > 50


def test_another_bucket_is_another_graph():
    """The counts above can change: 32 slots more are compiled anew."""
    counter = CompileCounter()
    compiled = counted_step(counter)
    cache = KVCache(MODEL.config.text, POLICIES["full"].build(2), (0, 1), static=True)
    for parts, graphs in (((3, 90, 12), 1), ((3, 130, 12), 2), ((3, 88, 12), 2)):
        answer(cache, [parts, parts], compiled)
        assert counter.frame_count == graphs


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    "name, how", [("full", "static"), ("avl, h2o text, filter", "static"), ("avl, h2o text, filter", "gathering")]
)
def test_inductor_on_the_cpu(name, how):
    """The step as the library compiles it."""
    compiled = compiled_decode_step(torch.device("cpu"))
    policy = POLICIES[name].build(2)
    cache = KVCache(MODEL.config.text, policy, (0, 1), **DECODES[how])
    torch._dynamo.utils.counters.clear()
    for parts in PROMPTS[:2]:
        plain, kinds = answer(KVCache(MODEL.config.text, policy, (0, 1)), parts, decode_step)
        logits, _ = answer(cache, parts, compiled)
        torch.testing.assert_close(logits[:, 0], plain[:, 0], atol=1e-4, rtol=0)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == len(kinds) + ("refresh" in kinds) and not counters["graph_break"]


@needs_compiler
@pytest.mark.slow
@torch.no_grad()
def test_the_blocks_of_a_prefill_are_compiled_once_for_all_lengths():
    model = tiny_model(1, layers=3)
    compiled = compiled_blocks(model)
    assert all(a is b for a, b in zip(model.parameters(), compiled.parameters(), strict=True))
    counters = torch._dynamo.utils.counters
    counters.clear()
    for i, parts in enumerate([(3, 90, 12), (2, 40, 9), (5, 200, 30), (12,)]):
        ids, policy = prompt_ids(model, *parts, seed=i), POLICIES["avl, h2o text, filter"].build(3)
        ours, plain = (
            prefill_step(m, KVCache(m.config.text, policy), [ids], image_features(m, ids), 4) for m in (compiled, model)
        )
        torch.testing.assert_close(ours, plain, atol=1e-4, rtol=0)
        assert 2 <= counters["stats"]["unique_graphs"] <= 4 and not counters["graph_break"]
    tiles = [torch.randn(n, 3, model.config.vision.image_size, model.config.vision.image_size) for n in (1, 3, 5, 4)]
    for pixels in tiles:
        torch.testing.assert_close(compiled.vision_tower(pixels), model.vision_tower(pixels), atol=1e-4, rtol=0)
    assert counters["stats"]["unique_graphs"] <= 8
