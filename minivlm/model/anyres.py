"""LLaVA-NeXT's "anyres" geometry: an image's resolution, its tiles, its unpadding, its tokens.

LLaVA-NeXT sees an image several times: once squashed to one tile (the base view), and once cut into
a grid of tiles at the best of a few resolutions (the pinpoints), into which the image is fitted
with padding on two sides. Tokens that see only padding are removed again, and each line of tokens
ends in a newline token.

Everything here is a pure function of integers. The image processor and the model both count tokens
with `image_tokens`, so that they cannot differ. All sizes are (height, width). The reference is
transformers' LlavaNext image processor and its `unpad_image`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from minivlm.model.config import VLMConfig

Size = tuple[int, int]  # (height, width)


def best_resolution(image: Size, pinpoints: Sequence[Size]) -> Size:
    """The pinpoint that keeps most of the image's pixels and, among equals, wastes fewest of its own."""

    def fit(pinpoint: Size) -> tuple[int, int]:
        scale = min(pinpoint[1] / image[1], pinpoint[0] / image[0])
        # Scaling an image up adds no information, so its own number of pixels is the most that
        # counts.
        effective = min(int(image[1] * scale) * int(image[0] * scale), image[0] * image[1])
        waste = pinpoint[0] * pinpoint[1] - effective
        return effective, -waste

    return max(pinpoints, key=fit)  # the first of several equals, as in the reference


def fitted_size(image: Size, target: Size) -> Size:
    """The size, in pixels, of the image scaled to fit inside `target`; the rest is padding."""
    scale_h, scale_w = target[0] / image[0], target[1] / image[1]
    if scale_w < scale_h:
        return min(math.ceil(image[0] * scale_w), target[0]), target[1]
    return target[0], min(math.ceil(image[1] * scale_h), target[1])


def padding_before(fitted: Size, target: Size) -> Size:
    """Pixels of padding above and left of the fitted image; an odd one goes below or right of it."""
    return (target[0] - fitted[0]) // 2, (target[1] - fitted[1]) // 2


def tile_grid(image: Size, config: VLMConfig) -> Size:
    """Height and width, in tiles, of the grid that covers the image at its best resolution."""
    height, width = best_resolution(image, config.image_grid_pinpoints)
    return height // config.vision.image_size, width // config.vision.image_size


def num_tiles(image: Size, config: VLMConfig) -> int:
    """Number of tiles of one image, including the base view."""
    grid_h, grid_w = tile_grid(image, config)
    return 1 + grid_h * grid_w


def unpadded_box(image: Size, grid: Size) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) of what remains of a grid when the padding is cut off.

    The grid and the result are measured in tokens. `bottom` and `right` lie just outside of what
    remains.
    """
    grid_h, grid_w = grid
    # The rounding to 7 places is the reference's. Without it, sizes such as (2, 2000) would be
    # miscounted.
    if image[1] / image[0] > grid_w / grid_h:
        pad = (grid_h - int(round(image[0] * (grid_w / image[1]), 7))) // 2
        return pad, grid_h - pad, 0, grid_w
    pad = (grid_w - int(round(image[1] * (grid_h / image[0]), 7))) // 2
    return 0, grid_h, pad, grid_w - pad


def image_tokens(image: Size, config: VLMConfig) -> int:
    """How many tokens an image takes in the prompt; in LLaVA-1.5, always the same number."""
    side = config.vision.grid
    if not config.is_next:
        return side * side + (config.select_strategy == "full")  # "full" keeps the class token
    grid_h, grid_w = tile_grid(image, config)
    top, bottom, left, right = unpadded_box(image, (grid_h * side, grid_w * side))
    lines, columns = bottom - top, right - left
    return side * side + lines * columns + lines  # base view, tiles, and a newline for each line
