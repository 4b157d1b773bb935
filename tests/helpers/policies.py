"""The settings and decode options under which every property of the cache is tested, and prompts to test it with."""

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

_ALL_PARTS = dict(
    vision=True,
    vision_rate=0.5,
    vision_compute_rate=0.75,
    vision_interval=3,
    filter=True,
    filter_layer=2,
    filter_rate=0.4,
    text=True,
    text_init_cache=4,
)

POLICIES: dict[str, CacheSettings] = {
    "full": AVLSettings(),
    "avl": preset("avl"),
    "avl, h2o text, filter": preset("avl", **_ALL_PARTS),
    "avl, direct text, filter": preset("avl", **_ALL_PARTS, text_h2o=False, text_direct=True),
    "avl, history text, window": preset("avl", **_ALL_PARTS | dict(filter=False), text_h2o=False, score_window=4),
    "text alone": AVLSettings(text=True, text_init_cache=4),
    "h2o": preset("h2o"),
    "fastv": preset("fastv"),
    "streaming": preset("streaming"),
    "random": preset("random", vision_interval=2, vision_compute_rate=0.8),
    "pyramid window": PyramidWindowSettings(),
    "drop": DropSettings(),
}

# The ways to run a decode step, as options of the cache.
DECODES: dict[str, dict[str, bool]] = {
    "plain": {},
    "static": dict(static=True),
    "gathering": dict(static=True, gather=True),
}

needs_compiler = pytest.mark.skipif(bool(missing_compiler(torch.device("cpu"))), reason="inductor needs a C++ compiler")


def prompt_ids(model: Llava, *parts: int, seed: int = 0) -> Tensor:
    """Random token ids [S] of a prompt.

    `parts` are the numbers of tokens of a text, an image, a text, an image and so on; 0 is allowed.
    """
    generator, image_token = torch.Generator().manual_seed(seed), model.config.image_token_index
    ids = []
    for i, count in enumerate(parts):
        if i % 2 == 0:
            ids.append(torch.randint(3, image_token, (count,), generator=generator))
        else:
            ids.append(torch.full((count,), image_token))
    return torch.cat(ids)


def image_features(model: Llava, ids: Tensor, seed: int = 0) -> list[Tensor]:
    """Random features for the image tokens of a prompt: one tensor [N, C], or none if there are no image tokens."""
    count = int((ids == model.config.image_token_index).sum())
    if count == 0:
        return []
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(count, model.config.text.hidden_size, generator=generator)
    return [features.to(model.lm_head.weight.dtype)]


def embed(model: Llava, prompts: Sequence[Tensor]) -> list[Tensor]:
    """Embeddings [S, C] of each prompt; the number of a prompt is the seed of its image features."""
    with torch.no_grad():
        return [model.embed(ids[None], image_features(model, ids, seed=i))[0] for i, ids in enumerate(prompts)]
