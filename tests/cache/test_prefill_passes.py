"""A batch that is prefilled in several passes gives what it gives in one."""

from __future__ import annotations

import pytest
import torch

from avl_cases import IMAGE_TOKEN, tiny_model
from cache_helpers import NO_STOP_IDS
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
def test_several_passes_give_what_one_gives(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(5)
    image_sizes = (20, 0, 33, 7, 12)
    prompts = [torch.tensor([1, 2] + [IMAGE_TOKEN] * n + list(range(3, 9 + n % 5))) for n in image_sizes]
    features = [torch.randn(n, 32, generator=generator) for n in image_sizes if n]

    def greedy_logits() -> list[torch.Tensor]:
        cache = KVCache(MODEL.config.text, SETTINGS[name].build(3), range(len(prompts)))
        logits = [steps.prefill_step(MODEL, cache, prompts, features, 6)]
        for _ in range(5):
            logits.append(steps.decode_step(MODEL, cache, logits[-1].argmax(dim=-1), NO_STOP_IDS))
        return logits

    in_one_pass = greedy_logits()
    monkeypatch.setattr(steps, "PREFILL_TOKENS", 90)  # two of the longest rows at once
    for ours, expected in zip(greedy_logits(), in_one_pass, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)
