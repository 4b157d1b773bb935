"""A batch prefilled in several passes gives what it gives in one."""

from __future__ import annotations

import pytest
import torch

from avl_cases import tiny_model
from minivlm.cache.kv_cache import KVCache
from minivlm.cache.policies import preset
from minivlm.cache.policies.avl import AVLSettings
from minivlm.generation import steps

MODEL = tiny_model(3)
SETTINGS = {
    "full": AVLSettings(),
    "avl": preset("avl", text=True, text_init_cache=4, filter=True, filter_layer=1),
    "h2o": preset("h2o"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_passes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(5)
    vision = (20, 0, 33, 7, 12)
    ids = [torch.tensor([1, 2] + [47] * n + list(range(3, 9 + n % 5))) for n in vision]
    features = [torch.randn(n, 32, generator=generator) for n in vision if n]

    def play() -> list[torch.Tensor]:
        cache = KVCache(MODEL.config.text, SETTINGS[name].build(3), range(len(ids)))
        logits = [steps.prefill_step(MODEL, cache, ids, features, 6)]
        for _ in range(5):
            logits.append(steps.decode_step(MODEL, cache, logits[-1].argmax(dim=-1), torch.empty(0, dtype=torch.int64)))
        return logits

    whole = play()
    monkeypatch.setattr(steps, "PREFILL_TOKENS", 90)  # two of the longest rows at once
    for ours, expected in zip(play(), whole):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)
