"""LLaVA-NeXT geometry: which resolution, how many tiles, what unpadding leaves, how many tokens.

Pure functions of integers.  The image processor and the model's packing both count through
`image_tokens`, so the two can never differ.  All sizes are (height, width).  Reference behaviour:
transformers' LlavaNext image processor and `unpad_image`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from minivlm.model.config import VLMConfig

Size = tuple[int, int]


def best_resolution(image: Size, pinpoints: Sequence[Size]) -> Size:
    """The pinpoint that keeps most of the image's own pixels, then the one that wastes fewest of its own."""

    def fit(pinpoint: Size) -> tuple[int, int]:
        scale = min(pinpoint[1] / image[1], pinpoint[0] / image[0])
        effective = min(int(image[1] * scale) * int(image[0] * scale), image[0] * image[1])
        return effective, effective - pinpoint[0] * pinpoint[1]  # the second is minus the waste

    return max(pinpoints, key=fit)  # the first of equals, as the reference


def fitted_size(image: Size, target: Size) -> Size:
    """The image scaled to fit inside `target`, in pixels; what is missing is padding."""
    scale_h, scale_w = target[0] / image[0], target[1] / image[1]
    if scale_w < scale_h:
        return min(math.ceil(image[0] * scale_w), target[0]), target[1]
    return target[0], min(math.ceil(image[1] * scale_h), target[1])


def padding_before(fitted: Size, target: Size) -> Size:
    """Zero pixels above and left of the fitted image; an odd pixel goes below / right."""
    return (target[0] - fitted[0]) // 2, (target[1] - fitted[1]) // 2


def tile_grid(image: Size, config: VLMConfig) -> Size:
    """Rows and columns of tiles that cover the image at its best resolution (the base view not counted)."""
    height, width = best_resolution(image, config.image_grid_pinpoints)
    return height // config.vision.image_size, width // config.vision.image_size


def num_tiles(image: Size, config: VLMConfig) -> int:
    """Tiles of one image, the base view included."""
    rows, cols = tile_grid(image, config)
    return 1 + rows * cols


def unpadded_box(image: Size, grid: Size) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) in tokens: what is left of a token grid once the padding is cut off.

    The rounding to 7 places is the reference's; without it, sizes such as (2, 2000) miscount.
    """
    rows, cols = grid
    if image[1] / image[0] > cols / rows:
        pad = (rows - int(round(image[0] * (cols / image[1]), 7))) // 2
        return pad, rows - pad, 0, cols
    pad = (cols - int(round(image[1] * (rows / image[0]), 7))) // 2
    return 0, rows, pad, cols - pad


def image_tokens(image: Size, config: VLMConfig) -> int:
    """How many tokens an image of (height, width) pixels takes in the prompt; LLaVA-1.5 always takes the same."""
    side = config.vision.grid
    if not config.is_next:
        return side * side + (config.select_strategy == "full")
    rows, cols = tile_grid(image, config)
    top, bottom, left, right = unpadded_box(image, (rows * side, cols * side))
    return side * side + (bottom - top) * (right - left) + (bottom - top)  # base view, tiles, a newline a row
