"""The settings that every property of the cache is tested under, and prompts to test it on."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from contract_policies import DropSettings, PyramidWindowSettings
from minivlm.cache.policies import preset
from minivlm.cache.policies.avl import AVLSettings
from minivlm.cache.settings import CacheSettings
from minivlm.generation.compile import missing_compiler
from minivlm.model.llava import Llava

_ALL = dict(
    vision=True, vision_rate=0.5, vision_compute_rate=0.75, vision_interval=3, filter=True, filter_layer=2, filter_rate=0.4,
    text=True, text_init_cache=4,
)  # fmt: skip

POLICIES: dict[str, CacheSettings] = {
    "full": AVLSettings(),
    "avl": preset("avl"),
    "avl, h2o text, filter": preset("avl", **_ALL),
    "avl, direct text, filter": preset("avl", **_ALL, text_h2o=False, text_direct=True),
    "avl, history text, window": preset("avl", **_ALL | dict(filter=False), text_h2o=False, score_window=4),
    "text alone": AVLSettings(text=True, text_init_cache=4),
    "h2o": preset("h2o"),
    "fastv": preset("fastv"),
    "streaming": preset("streaming"),
    "random": preset("random", vision_interval=2, vision_compute_rate=0.8),
    "pyramid window": PyramidWindowSettings(),
    "drop": DropSettings(),
}

# How a decode step is run: options of the cache.
DECODES: dict[str, dict[str, bool]] = {
    "plain": {},
    "static": dict(static=True),
    "gathering": dict(static=True, gather=True),
}

needs_compiler = pytest.mark.skipif(bool(missing_compiler(torch.device("cpu"))), reason="inductor needs a C++ compiler")


def prompt_ids(model: Llava, *parts: int, seed: int = 0) -> Tensor:
    """Token ids [S]: text and images in turn, `parts` tokens of each, text first (0 of it is fine)."""
    generator, image = torch.Generator().manual_seed(seed), model.config.image_token_index
    return torch.cat(
        [
            torch.full((count,), image) if i % 2 else torch.randint(3, image, (count,), generator=generator)
            for i, count in enumerate(parts)
        ]
    )


def image_features(model: Llava, ids: Tensor, seed: int = 0) -> list[Tensor]:
    """Random features [N, C] for the image tokens of `ids`."""
    count, generator = int((ids == model.config.image_token_index).sum()), torch.Generator().manual_seed(seed)
    return (
        [torch.randn(count, model.config.text.hidden_size, generator=generator).to(model.lm_head.weight.dtype)]
        if count
        else []
    )


def embed(model: Llava, ids: Sequence[Tensor]) -> list[Tensor]:
    """Embeddings [S_b, C] of several prompts."""
    with torch.no_grad():
        return [model.embed(row[None], image_features(model, row, seed=i))[0] for i, row in enumerate(ids)]
