"""Half precision: what stays is decided in float32, from the exact attention of the rounded queries and keys."""

from __future__ import annotations

import sys

import pytest
import torch

from avl_cases import tiny_model
from cache_helpers import greedy, prefill_prompts
from minivlm.cache.accounting import live_positions
from minivlm.cache.kv_cache import KVCache
from minivlm.cache.policies import preset
from minivlm.cache.prefill_pass import PrefillPass
from policies import DECODES, POLICIES, prompt_ids


@pytest.fixture
def ranked_dtypes(monkeypatch) -> set[torch.dtype]:
    """The dtypes of all scores that are ranked."""
    dtypes = set()

    def watched(rank):
        def ranking_scores(scores, *rest):
            dtypes.add(scores.dtype)
            return rank(scores, *rest)

        return ranking_scores

    cache_modules = [module for name, module in sys.modules.items() if name.startswith("minivlm.cache.")]
    for function in ("order_key", "best_first", "best_of"):
        for module in cache_modules:
            if hasattr(module, function):
                monkeypatch.setattr(module, function, watched(getattr(module, function)))
    return dtypes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", POLICIES)
def test_half_precision_decides_in_float32(dtype, name, ranked_dtypes):
    model = tiny_model(2).to(dtype)
    ids = prompt_ids(model, 3, 30, 2, 11, 9)
    logits = {}
    for how, options in DECODES.items():
        logits[how], cache = greedy(model, POLICIES[name], ids, 8, **options)
        assert logits[how].dtype == cache.layers[0].k.dtype == cache.layers[0].v.dtype == dtype
        assert logits[how].isfinite().all()
        for layer in cache.layers:
            assert layer.vision_attn.dtype == torch.float32
            assert layer.score is None or layer.score.dtype == torch.float32
    assert ranked_dtypes == (set() if name == "full" else {torch.float32})
    for how in DECODES:
        torch.testing.assert_close(logits[how][:1], logits["plain"][:1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_what_float64_would(dtype, monkeypatch):
    """The vision entries kept are the best by the exact attention of the rounded queries and keys."""
    projected = []  # queries and keys, by layer
    attend = PrefillPass.attend

    def watched(self, layer_idx, q, k, v):
        projected.append((q, k))
        return attend(self, layer_idx, q, k, v)

    monkeypatch.setattr(PrefillPass, "attend", watched)
    model = tiny_model(4, heads=(4, 2)).to(dtype)
    cache = KVCache(model.config.text, preset("avl").build(3))
    prefill_prompts(model, cache, [prompt_ids(model, 3, 200, 9)], 4)
    system, vision, text = set(range(3)), slice(3, 203), set(range(203, 212))
    assert len(projected) == 3
    for layer_idx, (q, k) in enumerate(projected):
        keys = k[0].double().repeat_interleave(2, dim=0)  # [H, S, D]
        scores = keys @ q[0, :, -1:].double().transpose(1, 2) / k.shape[-1] ** 0.5  # [H, S, 1]
        attn = scores.softmax(dim=1).mean(dim=0)[:, 0]  # [S]
        best = attn[vision].topk(100).indices + vision.start
        assert set(live_positions(cache, layer_idx, 0)[0].tolist()) == {*system, *best.tolist(), *text}
