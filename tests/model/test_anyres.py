"""LLaVA-NeXT geometry against transformers' functions, and against the token counts of the real checkpoints."""

import random
from types import SimpleNamespace

import pytest
import torch

from minivlm.model import anyres
from minivlm.model.config import VLMConfig

PINPOINTS = {
    "hub": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
    "small tiles": [[112, 224], [224, 112], [224, 224]],
    "one": [[336, 336]],
    "many": [[a * 56, b * 56] for a in range(1, 5) for b in range(1, 5)],
}
TILE = {"hub": (336, 14), "small tiles": (112, 16), "one": (336, 14), "many": (56, 14)}


def next_config(name: str = "hub") -> VLMConfig:
    image_size, patch_size = TILE[name]
    return VLMConfig.from_dict(
        {
            "model_type": "llava_next",
            "image_token_index": 5,
            "text_config": {"model_type": "llama"},
            "vision_config": {"model_type": "clip_vision_model", "image_size": image_size, "patch_size": patch_size},
            "image_grid_pinpoints": PINPOINTS[name],
        }
    )


def sizes(count: int, seed: int = 0) -> list[tuple[int, int]]:
    """Page sizes, tiny ones, thin ones, and near-squares, where the choices are closest."""
    rng = random.Random(seed)
    drawn = [(1, 1), (1, 2000), (2000, 1), (2, 2000), (336, 336), (672, 336), (337, 336)]
    for _ in range(count):
        choice = rng.randrange(4)
        if choice == 0:
            drawn.append((rng.randint(1, 4000), rng.randint(1, 4000)))
        elif choice == 1:
            drawn.append((rng.randint(1, 40), rng.randint(1, 40)))
        elif choice == 2:
            drawn.append(tuple(rng.sample([rng.randint(1, 9), rng.randint(1, 3000)], 2)))
        else:
            side = rng.randint(1, 1500)
            drawn.append((side, max(1, side + rng.randint(-3, 3))))
    return drawn


@pytest.mark.parametrize(
    "size, tokens",
    [
        ((336, 336), 1176), ((640, 480), 2352), ((480, 640), 2340), ((672, 672), 2928), ((899, 1024), 2634),
        ((2200, 1700), 2448), ((1000, 3000), 2328), ((1, 2000), 576),
    ],
)  # fmt: skip
def test_token_counts_of_the_hub_checkpoints(size, tokens):
    assert anyres.image_tokens(size, next_config()) == tokens


def test_range_of_token_counts():
    counts = [anyres.image_tokens(size, next_config()) for size in sizes(20_000, seed=1)]
    assert (min(counts), max(counts)) == (576, 2928)


@pytest.mark.parametrize("name", PINPOINTS)
def test_geometry_is_the_reference_s(name):
    processing = pytest.importorskip("transformers.image_processing_utils")
    modeling = pytest.importorskip("transformers.models.llava_next.modeling_llava_next")
    from transformers.image_utils import ChannelDimension
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    config, pinpoints = next_config(name), PINPOINTS[name]
    tile, _ = TILE[name]
    padder = LlavaNextImageProcessorPil()
    for size in sizes(3000, seed=2):
        best = anyres.best_resolution(size, config.image_grid_pinpoints)
        assert best == processing.select_best_resolution(size, pinpoints), size
        image = torch.empty(3, *size, device="meta")
        fitted = anyres.fitted_size(size, best)
        assert fitted == processing.get_patch_output_size(image, best, ChannelDimension.FIRST), size
        (top, _), (left, _) = padder._get_padding_size(fitted, best)
        assert anyres.padding_before(fitted, best) == (top, left), size
        assert anyres.tile_grid(size, config) == modeling.get_anyres_image_grid_shape(size, pinpoints, tile), size
        assert anyres.num_tiles(size, config) == modeling.image_size_to_num_patches(size, pinpoints, tile), size


@pytest.mark.parametrize("name", PINPOINTS)
def test_unpadding_and_counts_are_the_reference_s(name):
    modeling = pytest.importorskip("transformers.models.llava_next.modeling_llava_next")
    processing = pytest.importorskip("transformers.models.llava_next.processing_llava_next")

    config, pinpoints = next_config(name), PINPOINTS[name]
    tile, patch = TILE[name]
    counter = SimpleNamespace(
        image_processor=SimpleNamespace(image_grid_pinpoints=pinpoints), patch_size=patch, num_additional_image_tokens=0
    )
    counter._get_unpadded_features = lambda *args: processing.LlavaNextProcessor._get_unpadded_features(counter, *args)
    side = tile // patch
    for size in sizes(3000, seed=3):
        grid_h, grid_w = anyres.tile_grid(size, config)
        grid = (grid_h * side, grid_w * side)
        features = torch.arange(grid[0] * grid[1]).view(1, *grid)
        top, bottom, left, right = anyres.unpadded_box(size, grid)
        assert torch.equal(features[:, top:bottom, left:right], modeling.unpad_image(features, size)), size
        expected = processing.LlavaNextProcessor._get_number_of_features(counter, *size, tile, tile)
        assert anyres.image_tokens(size, config) == expected, size
