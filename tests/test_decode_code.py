"""What inductor makes of a decode step on a CPU: no copy of a cache buffer, no rotation inside the loop over keys."""

from __future__ import annotations

import re
import shutil

import pytest
import torch
from avl_cases import tiny_model
from policies import POLICIES, image_features, prompt_ids
from torch._inductor.utils import run_and_get_code

from minivlm.cache.kv import KVCache
from minivlm.generate import decode_step, prefill_step


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("name", ["full", "avl, h2o text, filter"])
@torch.no_grad()
def test_a_token_is_written_in_place(name):
    torch._dynamo.reset()
    model = tiny_model(1, layers=2)
    cache = KVCache(model.config.text, POLICIES[name].build(2), (0,), static=True)
    ids = prompt_ids(model, 3, 90, 12)
    prefill_step(model, cache, [ids], image_features(model, ids), 9)
    step = torch.compile(decode_step, fullgraph=True, dynamic=False)
    _, (code,) = run_and_get_code(step, model, cache, cache.kind, torch.tensor([5]), torch.tensor([2]))
    for buffer in (cache.layers[0].k, cache.layers[0].position):
        assert str(tuple(buffer.shape)) in code  # as an input
        assert f"empty_strided_cpu({tuple(buffer.shape)}" not in code
    sums = re.findall(r"float tmp_acc0 = .*?vec_reduce_all", code, re.S)
    assert len(sums) > 4 and ".cos()" in code
    assert not any(".cos()" in loop for loop in sums)
