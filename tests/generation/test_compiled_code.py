"""What inductor makes of a decode step on a CPU: no copy of what a cache holds, no rotation inside the loop over keys."""

from __future__ import annotations

import re

import pytest
import torch
from torch._inductor.utils import run_and_get_code

from avl_cases import tiny_model
from minivlm.cache.kv_cache import KVCache
from minivlm.generation.steps import forward_step, prefill_step
from policies import DECODES, POLICIES, image_features, needs_compiler, prompt_ids


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize(
    "name, how, kind",
    [
        ("full", "static", "full"),
        ("avl, h2o text, filter", "static", "core"),
        ("avl, h2o text, filter", "gathering", "core"),
        ("avl", "gathering", "refresh"),
    ],
)
@torch.no_grad()
def test_a_token_is_written_in_place(name, how, kind):
    torch._dynamo.reset()
    model = tiny_model(1, layers=2)
    cache = KVCache(model.config.text, POLICIES[name].build(2), (0,), **DECODES[how])
    ids = prompt_ids(model, 3, 290, 12)
    prefill_step(model, cache, [ids], image_features(model, ids), 9)
    step = torch.compile(forward_step, fullgraph=True, dynamic=False)
    _, (code,) = run_and_get_code(step, model, cache, kind, torch.tensor([5]), torch.tensor([2]))
    if kind == "core" and how == "gathering":  # what is read by index is never stored
        batch, kv_heads, slots, dim = cache.layers[0].k.shape
        read = cache.layers[0].core_slots.shape[1] + slots - cache.layers[0].layout.tail_start
        assert read < slots and f"empty_strided_cpu(({batch}, {kv_heads}, 2, {read})" in code  # the weights
        assert f"{read}, {dim})" not in code
    for buffer in (cache.layers[0].k, cache.layers[0].position):
        assert str(tuple(buffer.shape)) in code  # as an input
        assert f"empty_strided_cpu({tuple(buffer.shape)}" not in code
    sums = re.findall(r"float tmp_acc0 = .*?vec_reduce_all", code, re.S)
    assert len(sums) > 4 and ".cos()" in code
    assert not any(".cos()" in loop for loop in sums)
