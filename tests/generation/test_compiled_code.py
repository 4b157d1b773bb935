"""What inductor makes of a decode step on a CPU: no copy of a cache's buffers, no rotation in the loops over keys."""

from __future__ import annotations

import re

import pytest
import torch
from torch._inductor.utils import run_and_get_code

from avl_cases import tiny_model
from cache_helpers import prefill_prompts
from minivlm.cache import state
from minivlm.cache.kv_cache import KVCache
from minivlm.generation.steps import forward_step
from policies import DECODES, POLICIES, needs_compiler, prompt_ids


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize(
    "name, how, step_kind",
    [
        ("full", "static", "full"),
        ("avl, h2o text, filter", "static", "core"),
        ("avl, h2o text, filter", "gathering", "core"),
        ("avl", "gathering", "refresh"),
    ],
)
@torch.no_grad()
def test_a_token_is_written_in_place(name, how, step_kind, monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(state, "LARGE_BUCKET", 32)
    model = tiny_model(1, layers=2)
    cache = KVCache(model.config.text, POLICIES[name].build(2), **DECODES[how])
    prefill_prompts(model, cache, [prompt_ids(model, 3, 290, 12)], 9)
    step = torch.compile(forward_step, fullgraph=True, dynamic=False)
    _, (code,) = run_and_get_code(step, model, cache, step_kind, torch.tensor([5]), torch.tensor([2]))

    buffers = cache.layers[0]
    if step_kind == "core" and how == "gathering":  # keys and values that are read by index are never stored
        batch, kv_heads, slots, dim = buffers.k.shape
        slots_read = cache.core_slots.shape[2] + buffers.layout.tail
        assert slots_read < slots
        assert f"empty_strided_cpu(({batch}, {kv_heads}, 2, {slots_read})" in code  # the weights
        assert f"{slots_read}, {dim})" not in code
    for buffer in (buffers.k, buffers.position):
        assert str(tuple(buffer.shape)) in code  # as an input
        assert f"empty_strided_cpu({tuple(buffer.shape)}" not in code
    loops = re.findall(r"float tmp_acc0 = .*?vec_reduce_all", code, re.S)
    assert len(loops) > 4 and ".cos()" in code
    assert not any(".cos()" in loop for loop in loops)
