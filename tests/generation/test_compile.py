"""torch.compile: one whole graph for each kind of decode step and one for the choice of cores, used again and again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters

from avl_cases import tiny_model
from cache_helpers import prefill_prompts
from minivlm.cache import state
from minivlm.cache.cores import choose_cores
from minivlm.cache.kv_cache import KVCache
from minivlm.generation.compile import compiled_blocks, compiled_decode_step
from minivlm.generation.steps import DecodeStep, decode_step, forward_step
from policies import DECODES, POLICIES, needs_compiler, prompt_ids

MODEL = tiny_model(1, layers=2)
# Batches of two prompts. Their counts differ, but all fall into the same buckets of 32 slots.
BATCHES = [[(3, 90, 12), (2, 84, 9)], [(4, 86, 11), (1, 90, 14)], [(3, 88, 1, 2, 9), (2, 81, 12)]]
STEPS = 7


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def new_cache(name: str, how: str = "plain") -> KVCache:
    return KVCache(MODEL.config.text, POLICIES[name].build(2), (0, 1), **DECODES[how])


@torch.no_grad()
def answer(cache: KVCache, parts: Sequence[tuple[int, ...]], step: DecodeStep) -> tuple[torch.Tensor, int]:
    """Fill `cache` with a new batch whose second row ends at the fifth step.

    Returns its logits [STEPS + 1, B, V] and the number of graphs that it needs: one for each kind of step, and one for
    the choice of cores.
    """
    cache.reset(range(len(parts)))
    prompts = [prompt_ids(MODEL, *counts, seed=row) for row, counts in enumerate(parts)]
    logits = [prefill_prompts(MODEL, cache, prompts, STEPS + 1)]
    for i in range(STEPS):
        token = torch.tensor([10 + i, 2 if i == 4 else 30 + i])
        logits.append(step(MODEL, cache, token, torch.tensor([2])).clone())
    return torch.stack(logits), len(set(cache.step_kinds)) + ("refresh" in cache.step_kinds)


def counted_step(counter: CompileCounter, dynamic: bool = False) -> Callable:
    """A decode step in graphs that `counter` counts, divided as the library divides it."""
    compiled = partial(torch.compile, fullgraph=True, dynamic=dynamic, backend=counter)
    return partial(decode_step, forward=compiled(forward_step), choose=compiled(choose_cores))


QUICK = ("full", "avl, h2o text, filter", "avl, history text, window", "streaming")


@pytest.mark.parametrize("how", ["static", "gathering"])
@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in POLICIES]
)
def test_one_graph_for_each_kind_of_step(name, how):
    counter = CompileCounter()
    compiled = counted_step(counter)
    reused = new_cache(name, how)
    for parts in BATCHES:
        expected, graphs = answer(new_cache(name), parts, decode_step)
        for cache in (reused, new_cache(name, how)):  # other buffers of the same size are no reason to compile again
            logits, _ = answer(cache, parts, compiled)
            torch.testing.assert_close(logits[:, 0], expected[:, 0], atol=1e-4, rtol=0)
            torch.testing.assert_close(logits[:5, 1], expected[:5, 1], atol=1e-4, rtol=0)
            assert counter.frame_count == graphs
    assert counter.op_count > 50


def image_sizes(count: int) -> list[tuple[int, int, int]]:
    """Prompts of many lengths, as images of many sizes make them."""
    sizes = torch.randint(0, 100, (count, 2), generator=torch.Generator().manual_seed(0)).tolist()
    return [(3, 20 + 3 * image, 5 + text // 4) for image, text in sizes]


@pytest.mark.parametrize("name, graphs", [("full", 1), ("avl, h2o text, filter", 3)])
def test_on_a_cpu_all_sizes_share_their_graphs(name, graphs):
    counter = CompileCounter()
    compiled = counted_step(counter, dynamic=True)
    cache, layouts = new_cache(name, "static"), set()
    for parts in image_sizes(7):
        logits, _ = answer(cache, [parts, parts], compiled)
        expected, _ = answer(new_cache(name), [parts, parts], decode_step)
        torch.testing.assert_close(logits[:, 0], expected[:, 0], atol=1e-4, rtol=0)
        layouts.add(cache.layers[0].layout)
    assert counter.frame_count == graphs and len(layouts) >= 4


def test_on_cuda_a_graph_is_made_only_where_buffers_grow(monkeypatch):
    monkeypatch.setattr(state, "LARGE_BUCKET", 64)
    counter = CompileCounter()
    compiled = counted_step(counter)
    cache, layouts = new_cache("full", "gathering"), []
    for parts in ((3, 90, 12), (3, 40, 12), (3, 130, 12), (3, 60, 30), (3, 120, 9)):
        logits, _ = answer(cache, [parts, parts], compiled)
        expected, _ = answer(new_cache("full"), [parts, parts], decode_step)
        torch.testing.assert_close(logits[:, 0], expected[:, 0], atol=1e-4, rtol=0)
        layouts.append(cache.layers[0].layout)
        assert counter.frame_count == len(set(layouts))
    assert len(set(layouts)) == 2 and layouts[1:2] == layouts[:1] and layouts[2:] == 3 * layouts[2:3]


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    "name, how", [("full", "static"), ("avl, h2o text, filter", "static"), ("avl, h2o text, filter", "gathering")]
)
def test_inductor_on_the_cpu(name, how):
    """The step as the library compiles it."""
    compiled = compiled_decode_step(torch.device("cpu"))
    cache = new_cache(name, how)
    for parts in BATCHES[:2]:
        expected, graphs = answer(new_cache(name), parts, decode_step)
        logits, _ = answer(cache, parts, compiled)
        torch.testing.assert_close(logits[:, 0], expected[:, 0], atol=1e-4, rtol=0)
    assert counters["stats"]["unique_graphs"] == graphs and not counters["graph_break"]


@needs_compiler
@pytest.mark.slow
@torch.no_grad()
def test_the_blocks_of_a_prefill_are_compiled_once_for_all_lengths():
    model = tiny_model(1, layers=3)
    compiled = compiled_blocks(model)
    assert all(a is b for a, b in zip(model.parameters(), compiled.parameters(), strict=True))
    policy = POLICIES["avl, h2o text, filter"].build(3)
    for i, parts in enumerate([(3, 90, 12), (2, 40, 9), (5, 200, 30), (12,)]):
        ids = prompt_ids(model, *parts, seed=i)
        ours, expected = (
            prefill_prompts(each, KVCache(each.config.text, policy), [ids], 4) for each in (compiled, model)
        )
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)
        assert 2 <= counters["stats"]["unique_graphs"] <= 4 and not counters["graph_break"]
    size = model.config.vision.image_size
    for count in (1, 3, 5, 4):
        tiles = torch.randn(count, 3, size, size)
        torch.testing.assert_close(compiled.vision_tower(tiles), model.vision_tower(tiles), atol=1e-4, rtol=0)
    assert counters["stats"]["unique_graphs"] <= 8
