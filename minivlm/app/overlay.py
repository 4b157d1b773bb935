"""A picture of what the cache holds: an image whose patches are evicted, secondary or core.

`token_boxes` says which part of an image each vision token sees. It inverts the resizing, cropping
and tiling of `minivlm.inputs.images` and the unpadding and packing of `minivlm.model.llava`.
`token_states` says what became of each token, and `draw_overlay` paints these states over the
image. A LLaVA-NeXT image is shown twice, under its tiles and under its base view, because these see
it at different resolutions.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from minivlm.cache.recorder import HELD, Recorder
from minivlm.errors import UserError
from minivlm.inputs.image_settings import ImageSettings
from minivlm.model import anyres
from minivlm.model.config import VLMConfig

Box = tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels; x1 and y1 lie just outside

# Colour and opacity of evicted, secondary and core. They are weak enough to keep the text of a page
# legible, and no mixture of two of these hues looks like the third.
_COLOURS = (
    ((70, 75, 95), 0.62),
    ((255, 215, 60), 0.45),
    ((240, 60, 30), 0.5),
)

# Sizes in pixels. An image is drawn from 900 to 1400 wide, unless that makes it higher than 2000.
_MIN_WIDTH = 900
_MAX_WIDTH = 1400
_MAX_HEIGHT = 2000
_GAP = 24  # between panels
_LINE = 40  # height of a line of text
_FONT = 22  # size of its letters


def token_boxes(
    image_size: anyres.Size,
    config: VLMConfig,
    settings: ImageSettings | None = None,
) -> list[Box | None]:
    """The boxes on an image of (height, width) that its N vision tokens see, in prompt order.

    Boxes are clipped to the image. They are None for tokens that see no part of the image:
    newlines, the class token, patches of padding. `settings` matters for LLaVA-1.5 only; without
    it, the shortest edge is resized to the tile and the centre cropped.
    """
    side = config.vision.grid
    tile = config.vision.image_size
    whole_tile = (0, side, 0, side)
    if not config.is_next:
        scale, shift = _cropping(image_size, tile, settings)
        class_token: list[Box | None] = [None] if config.select_strategy == "full" else []
        return class_token + list(chain(*_grid_boxes(image_size, scale, shift, whole_tile, config)))

    # The base view is the whole image, squashed to one tile.
    base = _grid_boxes(image_size, _ratio((tile, tile), image_size), (0, 0), whole_tile, config)

    # The tiles cover the image fitted into its best resolution, with padding on two sides. Tokens
    # that see only padding are left out, and a newline ends each line.
    target = anyres.best_resolution(image_size, config.image_grid_pinpoints)
    fitted = anyres.fitted_size(image_size, target)
    grid_h, grid_w = anyres.tile_grid(image_size, config)
    unpadded = anyres.unpadded_box(image_size, (grid_h * side, grid_w * side))
    before = anyres.padding_before(fitted, target)
    tiles = _grid_boxes(image_size, _ratio(fitted, image_size), before, unpadded, config)
    with_newlines = [[*line, None] for line in tiles]
    return list(chain(*base, *with_newlines))


def _cropping(
    image: anyres.Size, tile: int, settings: ImageSettings | None
) -> tuple[tuple[float, float], tuple[float, float]]:
    """LLaVA-1.5: (scale, shift) from the image to the cropped tile, each for (y, x), in pixels."""
    height, width = image
    pad_top = 0
    pad_left = 0
    if settings is not None and settings.pad_to_square:
        longest = max(image)
        pad_top = (longest - height) // 2
        pad_left = (longest - width) // 2
        height, width = longest, longest
    resized = tile if settings is None else settings.resize
    if isinstance(resized, int):  # the length of the shortest edge
        shortest = min(height, width)
        resized = (int(resized * height / shortest), int(resized * width / shortest))
    scale_y, scale_x = _ratio(resized, (height, width))
    shift_y = pad_top * scale_y - (resized[0] - tile) // 2
    shift_x = pad_left * scale_x - (resized[1] - tile) // 2
    return (scale_y, scale_x), (shift_y, shift_x)


def _ratio(new: anyres.Size, old: anyres.Size) -> tuple[float, float]:
    return new[0] / old[0], new[1] / old[1]


def _grid_boxes(
    image: anyres.Size,
    scale: tuple[float, float],
    shift: tuple[float, float],
    window: tuple[int, int, int, int],
    config: VLMConfig,
) -> list[list[Box | None]]:
    """Boxes of the tokens in a `window` (top, bottom, left, right) of a grid, line by line.

    Pixel (y, x) of the image lies at scale · (y, x) + shift on the tiles.
    """
    vision = config.vision

    def span(token: int, axis: int) -> tuple[float, float]:
        """Where a line (axis 0) or column (axis 1) of tokens begins and ends on the image."""
        # Pixels at a tile's end that do not fill a whole patch belong to no token.
        start = token // vision.grid * vision.image_size + token % vision.grid * vision.patch_size
        first = (start - shift[axis]) / scale[axis]
        end = (start + vision.patch_size - shift[axis]) / scale[axis]
        return max(first, 0.0), min(end, float(image[axis]))

    top, bottom, left, right = window
    spans_y = [span(line, 0) for line in range(top, bottom)]
    spans_x = [span(col, 1) for col in range(left, right)]

    def box(y0: float, y1: float, x0: float, x1: float) -> Box | None:
        return (x0, y0, x1, y1) if x0 < x1 and y0 < y1 else None

    return [[box(*span_y, *span_x) for span_x in spans_x] for span_y in spans_y]


def token_states(recorder: Recorder, step: int | None = None) -> Tensor:
    """Shares [L, 3, N] of the heads in which a token is evicted, secondary and core after `step`.

    The N tokens are the vision tokens of the recording. With `step` None, it is the last step that
    chose cores or, if no step uses cores, the end of the recording. A policy without cores has no
    secondary tokens; whatever it keeps counts as core. Raises `UserError` for a negative step.
    """
    if step is not None and step < 0:
        raise UserError(f"step is {step} (expected 0, the prefill, or more)")
    vision = recorder.vision_positions  # [N]
    choices = [choice for choice in used_cores(recorder) if step is None or choice[0] <= step]
    if choices and step is None:
        step = choices[-1][0]
    fate = recorder.fate[:, :, vision]  # [L, H_kv, N]
    is_kept = fate == HELD
    if step is not None:
        is_kept |= fate > min(step, torch.iinfo(fate.dtype).max)  # evicted later
    kept = is_kept.float().mean(dim=1)  # [L, N]
    core = kept
    if choices:
        core_positions = choices[-1][1]  # one [C] tensor per layer
        is_core = [torch.isin(vision, positions.long()) for positions in core_positions]
        core = kept * torch.stack(is_core)
    return torch.stack((1 - kept, kept - core, core), dim=1)


def used_cores(recorder: Recorder) -> list[tuple[int, list[Tensor]]]:
    """The choices of cores, if any step leaves out the other entries.

    With an interval of 1 or less, cores are chosen, as in the paper, but every step uses all
    entries; then there is nothing to tell apart.
    """
    return recorder.cores if recorder.interval > 1 else []


def check_layer(layer_idx: int, num_layers: int) -> None:
    """Raise `UserError` for a layer that the model does not have."""
    if not 0 <= layer_idx < num_layers:
        raise UserError(f"--overlay_layer is {layer_idx}, the model has layers 0 to {num_layers - 1}")


def draw_overlay(
    images: Sequence[Image.Image],
    config: VLMConfig,
    recorder: Recorder,
    *,
    layer_idx: int | None = None,
    step: int | None = None,
    settings: ImageSettings | None = None,
) -> Image.Image:
    """Paint the states after `step` over each image, as the mean of all layers and for one layer.

    The images are those of the recorded prompt, in order. `layer_idx` None is the middle layer;
    `step` is explained in `token_states` and `settings` in `token_boxes`. Raises `UserError` for a
    layer or step that does not exist.
    """
    boxes = [token_boxes((image.height, image.width), config, settings) for image in images]
    counts = [len(image_boxes) for image_boxes in boxes]
    states = token_states(recorder, step)  # [L, 3, N]
    num_layers, _, num_tokens = states.shape
    if sum(counts) != num_tokens:
        raise ValueError(f"{num_tokens} vision tokens for images of {counts} tokens")
    if layer_idx is None:
        layer_idx = num_layers // 2
    check_layer(layer_idx, num_layers)
    shown = {
        f"mean of {num_layers} layers": states.mean(dim=0),
        f"layer {layer_idx}": states[layer_idx],
    }
    labels = {0: "evicted", 1: "secondary", 2: "core"}
    if not used_cores(recorder):
        labels = {0: "evicted", 2: "kept"}

    lines: list[list[Image.Image]] = []
    start = 0
    for number, (image, image_boxes) in enumerate(zip(images, boxes, strict=True), 1):
        end = start + len(image_boxes)
        prefix = f"image {number}, " if len(images) > 1 else ""
        shares = {where: mix[:, start:end] for where, mix in shown.items()}
        lines += _image_panels(image, image_boxes, shares, prefix, labels, config)
        start = end
    return _sheet(_legend(labels), lines)


def _image_panels(
    image: Image.Image,
    boxes: Sequence[Box | None],
    shares: dict[str, Tensor],
    prefix: str,
    labels: dict[int, str],
    config: VLMConfig,
) -> list[list[Image.Image]]:
    """The panels of one image: a line for each of `shares` [3, n], a column for each view.

    LLaVA-1.5 has a single view, so that there all panels stand in one line.
    """
    page = _enlarged(image)
    zoom = (page.width / image.width, page.height / image.height)
    views = {"page": slice(0, len(boxes))}
    if config.is_next:
        base_tokens = config.vision.grid**2
        views = {"tiles": slice(base_tokens, len(boxes)), "base view": slice(0, base_tokens)}
    lines = [
        [
            _panel(page, zoom, boxes[view], mix[:, view], f"{prefix}{name}, {where}", labels)
            for name, view in views.items()
        ]
        for where, mix in shares.items()
    ]
    return lines if config.is_next else [list(chain(*lines))]


def _enlarged(image: Image.Image) -> Image.Image:
    width = min(max(image.width, _MIN_WIDTH), _MAX_WIDTH)
    scale = min(width / image.width, _MAX_HEIGHT / image.height)
    size = (max(round(image.width * scale), 1), max(round(image.height * scale), 1))
    return image.resize(size, Image.Resampling.BICUBIC)


def _panel(
    page: Image.Image,
    zoom: tuple[float, float],
    boxes: Sequence[Box | None],
    shares: Tensor,
    title: str,
    labels: dict[int, str],
) -> Image.Image:
    """The page under the mixed colours of its tokens, below a line of text that sums them up.

    `shares` [3, n] are those of the n tokens of `boxes`; `zoom` (x, y) leads from pixels of the
    image to the page's.
    """
    veil = Image.new("RGBA", page.size)
    pencil = ImageDraw.Draw(veil)
    for box, mix in zip(boxes, shares.T.tolist(), strict=True):
        if box is None:
            continue
        x0, y0, x1, y1 = (round(edge * zoom[i % 2]) for i, edge in enumerate(box))
        gap = int(min(x1 - x0, y1 - y0) >= 8)  # separates patches, unless they are tiny
        if x1 - gap > x0 and y1 - gap > y0:
            pencil.rectangle((x0, y0, x1 - 1 - gap, y1 - 1 - gap), fill=_mixed(mix))

    seen = shares[:, [box is not None for box in boxes]]  # [3, patches]
    means = seen.mean(dim=1).tolist() if seen.shape[1] else [0.0] * 3
    summary = ", ".join(f"{label} {means[i]:.0%}" for i, label in reversed(labels.items()))
    panel = Image.new("RGB", (max(page.width, _MIN_WIDTH), _LINE + page.height), "white")
    _write(panel, (0, 0), f"{title}: {summary} of {seen.shape[1]} patches")
    panel.paste(Image.alpha_composite(page.convert("RGBA"), veil).convert("RGB"), (0, _LINE))
    return panel


def _mixed(shares: Sequence[float]) -> tuple[int, int, int, int]:
    """The states' colours (RGBA), each weighted by its share and opacity."""
    weights = [share * opacity for share, (_, opacity) in zip(shares, _COLOURS, strict=True)]
    alpha = sum(weights)
    colours = [colour for colour, _ in _COLOURS]
    red, green, blue = (
        round(sum(weight * part for weight, part in zip(weights, channel, strict=True)) / alpha)
        for channel in zip(*colours, strict=True)
    )
    return red, green, blue, round(255 * alpha)


def _legend(labels: dict[int, str]) -> Image.Image:
    legend = Image.new("RGB", (2 * _MIN_WIDTH, _LINE), "white")
    x = 0
    for i, label in reversed(labels.items()):
        swatch = Image.new("RGBA", (_LINE, _FONT), _mixed([float(i == j) for j in range(3)]))
        legend.paste(swatch, (x, (_LINE - _FONT) // 2), swatch)
        x = _write(legend, (x + _LINE + 8, 0), label) + _GAP
    _write(legend, (x, 0), "mixed colours: layers or heads differ; no colour: not seen by the model")
    return legend


def _write(picture: Image.Image, corner: tuple[int, int], text: str) -> int:
    """Write a line of text and return the x at which it ends."""
    font = ImageFont.load_default(size=_FONT)
    pencil = ImageDraw.Draw(picture)
    pencil.text((corner[0], corner[1] + _LINE // 2), text, fill="black", font=font, anchor="lm")
    return corner[0] + round(pencil.textlength(text, font=font))


def _sheet(legend: Image.Image, lines: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """The legend above all lines of panels, on white, with gaps between and around them."""
    all_lines = [[legend], *lines]
    widths = [sum(panel.width + _GAP for panel in line) for line in all_lines]
    heights = [max(panel.height for panel in line) + _GAP for line in all_lines]
    sheet = Image.new("RGB", (max(widths) + _GAP, sum(heights) + _GAP), "white")
    y = _GAP
    for line, height in zip(all_lines, heights, strict=True):
        x = _GAP
        for panel in line:
            sheet.paste(panel, (x, y))
            x += panel.width + _GAP
        y += height
    return sheet
