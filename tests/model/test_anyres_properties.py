"""What holds for images of any size and checkpoints with any resolutions."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from minivlm.model import anyres
from minivlm.model.config import VLMConfig
from minivlm.model.llava import Llava

TILE, PATCH = 28, 7  # four patches along one side of a tile

sides = st.integers(1, 4000) | st.sampled_from([1, 2, 3, TILE, TILE + 1, 89_000_000])
sizes = st.tuples(sides, sides)
multiples = st.integers(1, 6).map(lambda n: n * TILE)
pinpoints = st.lists(st.tuples(multiples, multiples), min_size=1, max_size=6, unique=True)


def next_config(points) -> VLMConfig:
    text = {
        "model_type": "llama",
        "vocab_size": 8,
        "hidden_size": 4,
        "intermediate_size": 4,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
    }
    vision = {
        "image_size": TILE,
        "patch_size": PATCH,
        "hidden_size": 4,
        "intermediate_size": 4,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
    }
    return VLMConfig.from_dict(
        {
            "model_type": "llava_next",
            "image_token_index": 5,
            "text_config": text,
            "vision_config": vision,
            "image_grid_pinpoints": points,
        }
    )


@given(sizes, pinpoints)
def test_the_image_is_fitted_into_its_resolution_as_large_as_it_goes(image, points):
    target = anyres.best_resolution(image, points)
    assert target in points
    height, width = anyres.fitted_size(image, target)
    assert 1 <= height <= target[0] and 1 <= width <= target[1]
    assert height == target[0] or width == target[1]
    # Of the exact proportions, at most the next pixel is taken.
    scale = min(target[0] / image[0], target[1] / image[1])
    assert abs(height - image[0] * scale) < 1 + 1e-6 and abs(width - image[1] * scale) < 1 + 1e-6
    top, left = anyres.padding_before((height, width), target)
    assert 0 <= target[0] - height - 2 * top <= 1 and 0 <= target[1] - width - 2 * left <= 1


@given(sizes, pinpoints)
def test_no_other_resolution_keeps_more_pixels(image, points):
    def kept(point):
        scale = min(point[1] / image[1], point[0] / image[0])
        return min(int(image[1] * scale) * int(image[0] * scale), image[0] * image[1])

    best = anyres.best_resolution(image, points)
    assert kept(best) == max(map(kept, points))
    assert best[0] * best[1] == min(h * w for h, w in points if kept((h, w)) == kept(best))


@given(sizes, st.tuples(st.integers(1, 60), st.integers(1, 60)))
def test_unpadding_takes_the_same_from_both_sides(image, grid):
    top, bottom, left, right = anyres.unpadded_box(image, grid)
    assert 0 <= top <= bottom <= grid[0] and 0 <= left <= right <= grid[1]
    assert top + bottom == grid[0] and left + right == grid[1]
    assert (top, bottom) == (0, grid[0]) or (left, right) == (0, grid[1])


@given(sizes, pinpoints)
def test_the_model_makes_as_many_tokens_as_the_prompt_has_places(image, points):
    config = next_config(points)
    with torch.device("meta"):
        model = Llava(config)
    features = torch.empty(anyres.num_tiles(image, config), config.vision.grid**2, 4, device="meta")
    assert len(model._pack(features, image)) == anyres.image_tokens(image, config)
