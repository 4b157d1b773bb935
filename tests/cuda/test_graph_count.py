"""How many shapes a cache's tensors take on a GPU while prompts of many sizes come: each may cost graphs of its own."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch

from avl_cases import tiny_model
from eval.speed.shapes import shape_config
from minivlm.cache.kv_cache import KVCache
from minivlm.cache.policies import preset
from minivlm.model.anyres import image_tokens

NEXT = shape_config("llava-v1.6-vicuna-7b")
PROMPTS = 1000
CONTEXT = 4096


def prompts(seed: int) -> list[torch.Tensor]:
    """Which tokens of each prompt are an image's: an image of any size, between two texts."""
    rng = random.Random(seed)
    masks = []
    for _ in range(PROMPTS):
        size = (rng.randint(100, 2000), rng.randint(100, 2000))
        before, vision, after = rng.randint(5, 40), image_tokens(size, NEXT), rng.randint(10, 90)
        masks.append(torch.tensor([False] * before + [True] * vision + [False] * after))
    return masks


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["full", "avl", "streaming"])
@torch.no_grad()
def test_images_of_many_sizes_make_few_shapes(policy):
    """Buffers of a GPU never shrink, so a shape is left for good; and they grow in large steps."""
    text = tiny_model(0, layers=1, heads=(1, 1), head_dim=8, context=CONTEXT).config.text
    cache = KVCache(text, preset(policy).build(1), static=True, gather=True)
    seen: list[list[torch.Size]] = []
    for mask in prompts(0):
        cache.reset((0,))
        (prefill,) = cache.prefill([mask], max_new_tokens=128)
        prefill.attend(0, *torch.zeros(3, 1, 1, len(mask), 8))
        shapes = [tensor.shape for tensor in cache.tensors()]
        if not seen or shapes != seen[-1]:
            seen.append(shapes)
    assert len(seen) <= 4
    for before, after in pairwise(seen):
        assert all(old.numel() <= new.numel() for old, new in zip(before, after, strict=True))
