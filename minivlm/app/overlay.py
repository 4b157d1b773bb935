"""A page with its patches coloured by what the cache holds of them: evicted, secondary or core.

`token_boxes` says which part of a page each vision token sees; it inverts the resizing, cropping and tiling of
`minivlm.inputs.images` and the unpadding and packing of `minivlm.model.llava`.  `draw` lays what a `Recorder` saw over the page.
A LLaVA-NeXT page is shown twice, under the tiles and under the base view, which see it at different resolutions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from minivlm.cache.recorder import HELD, Recorder
from minivlm.errors import UserError
from minivlm.inputs.images import ImageSettings, to_rgb
from minivlm.model import anyres
from minivlm.model.config import VLMConfig

Box = tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels of the page; x1 and y1 lie outside

# Colour and opacity of evicted, secondary and core: weak enough that the text of the page stays legible, and of hues
# whose mixtures cannot be mistaken for one of the others.
_COLOURS = (((70, 75, 95), 0.62), ((255, 215, 60), 0.45), ((240, 60, 30), 0.5))
_NARROW, _WIDE, _TALL = 900, 1400, 2000  # pixels: a page is drawn from 900 to 1400 wide unless that makes it too tall
_GAP, _LINE, _TEXT = 24, 40, 22  # pixels: between panels, of a line of text, of its letters


def token_boxes(image_size: anyres.Size, config: VLMConfig, settings: ImageSettings | None = None) -> list[Box | None]:
    """The box that each of the N vision tokens of an image of (height, width) sees, clipped to the image, in prompt order.

    None for tokens that see no part of it: newlines, the class token, patches of padding.  `settings` matters for
    LLaVA-1.5 alone; without them the shortest edge is resized to the tile and the centre cropped.
    """
    side, tile = config.vision.grid, config.vision.image_size
    square = (0, side, 0, side)
    if not config.is_next:
        first: list[Box | None] = [None] if config.select_strategy == "full" else []
        return first + sum(_grid(image_size, *_cropping(image_size, tile, settings), square, config), [])
    base = _grid(image_size, _ratio((tile, tile), image_size), (0, 0), square, config)
    target = anyres.best_resolution(image_size, config.image_grid_pinpoints)
    fitted = anyres.fitted_size(image_size, target)
    rows, cols = anyres.tile_grid(image_size, config)
    window = anyres.unpadded_box(image_size, (rows * side, cols * side))
    tiles = _grid(image_size, _ratio(fitted, image_size), anyres.padding_before(fitted, target), window, config)
    return sum(base, []) + sum(([*row, None] for row in tiles), [])  # a newline ends each row


def _cropping(
    image: anyres.Size, tile: int, settings: ImageSettings | None
) -> tuple[tuple[float, float], tuple[float, float]]:
    """LLaVA-1.5: (scale, shift) from pixels of the page to pixels of the cropped tile, each for (y, x)."""
    edge = tile if settings is None else settings.resize
    whole, before = image, (0, 0)
    if settings is not None and settings.pad_to_square:
        whole = (max(image), max(image))
        before = tuple((max(image) - length) // 2 for length in image)
    resized = tuple(int(edge * length / min(whole)) for length in whole) if isinstance(edge, int) else edge
    scale = _ratio(resized, whole)
    return scale, tuple(b * s - (r - tile) // 2 for b, s, r in zip(before, scale, resized))


def _ratio(new: anyres.Size, old: anyres.Size) -> tuple[float, float]:
    return new[0] / old[0], new[1] / old[1]


def _grid(
    image: anyres.Size,
    scale: tuple[float, float],
    shift: tuple[float, float],
    window: tuple[int, int, int, int],
    config: VLMConfig,
) -> list[list[Box | None]]:
    """Boxes of the tokens [top:bottom, left:right] of a grid over tiles, on which the page lies as scale · (y, x) + shift."""
    vision = config.vision

    def edges(token: int, axis: int) -> tuple[float, float]:
        # Pixels that do not fill a patch at a tile's end belong to no token.
        start = token // vision.grid * vision.image_size + token % vision.grid * vision.patch_size
        page = [(edge - shift[axis]) / scale[axis] for edge in (start, start + vision.patch_size)]
        return max(page[0], 0.0), min(page[1], float(image[axis]))

    top, bottom, left, right = window
    spans_y, spans_x = [edges(row, 0) for row in range(top, bottom)], [edges(col, 1) for col in range(left, right)]
    return [[(x0, y0, x1, y1) if x0 < x1 and y0 < y1 else None for x0, x1 in spans_x] for y0, y1 in spans_y]


def token_states(recorder: Recorder, vision_positions: Sequence[int], step: int | None = None) -> Tensor:
    """Shares [L, 3, N] of the key/value heads for which a vision token is evicted, secondary and core after `step`.

    `step` None is the last choice of the cores, or where there are none the end of the recording.  A policy without
    cores has no secondary tokens: all it keeps counts as core.  Raises `UserError` for a negative step.
    """
    if step is not None and step < 0:
        raise UserError(f"step is {step} (expected 0, the prefill, or more)")
    vision = torch.tensor(vision_positions, dtype=torch.int64)
    chosen = [core for core in recorder.cores if step is None or core[0] <= step]
    if chosen and step is None:
        step = chosen[-1][0]
    fate = recorder.fate[:, :, vision]  # [L, H_kv, N]
    held = fate == HELD if step is None else (fate == HELD) | (fate > step)
    kept = held.float().mean(dim=1)  # [L, N]
    core = kept
    if chosen:
        core = kept * torch.stack([torch.isin(vision, positions.long()) for positions in chosen[-1][1]])
    return torch.stack((1 - kept, kept - core, core), dim=1)


def draw(
    images: list[Image.Image],
    config: VLMConfig,
    recorder: Recorder,
    vision_positions: list[int],
    num_layers: int,
    layer: int | None = None,
    step: int | None = None,
    settings: ImageSettings | None = None,
) -> Image.Image:
    """Each page under the mean of all layers and under `layer` (None: the middle one), by the states after `step`.

    `vision_positions` are those of all images' tokens, in prompt order; `step` as in `token_states`, `settings` as in
    `token_boxes`.  Raises `UserError` for a layer or step that does not exist.
    """
    layer = num_layers // 2 if layer is None else layer
    if not 0 <= layer < num_layers:
        raise UserError(f"--overlay_layer is {layer}, the model has layers 0 to {num_layers - 1}")
    boxes = [token_boxes((image.height, image.width), config, settings) for image in images]
    if sum(map(len, boxes)) != len(vision_positions):
        raise ValueError(f"{len(vision_positions)} vision tokens for images of {[len(each) for each in boxes]} tokens")
    states = token_states(recorder, vision_positions, step)  # [L, 3, N]
    shown = {f"mean of {num_layers} layers": states.mean(dim=0), f"layer {layer}": states[layer]}
    labels = {0: "evicted", 1: "secondary", 2: "core"} if recorder.cores else {0: "evicted", 2: "kept"}

    rows, start = [], 0
    for number, (image, each) in enumerate(zip(images, boxes), 1):
        page = _enlarged(to_rgb(image))
        zoom = page.width / image.width, page.height / image.height
        base = config.vision.grid**2 if config.is_next else 0
        views = {"tiles": (base, len(each)), "base view": (0, base)} if config.is_next else {"page": (0, len(each))}
        which = f"image {number}, " if len(images) > 1 else ""
        panels = [
            [
                _panel(
                    page,
                    zoom,
                    each[first:end],
                    shares[:, start + first : start + end],
                    f"{which}{view}, {where}",
                    labels,
                )
                for view, (first, end) in views.items()
            ]
            for where, shares in shown.items()
        ]
        rows += panels if config.is_next else [sum(panels, [])]
        start += len(each)
    return _sheet(_legend(labels), rows)


def _enlarged(page: Image.Image) -> Image.Image:
    width = min(max(page.width, _NARROW), _WIDE)
    scale = min(width / page.width, _TALL / page.height)
    return page.resize(
        (max(round(page.width * scale), 1), max(round(page.height * scale), 1)), Image.Resampling.BICUBIC
    )


def _panel(
    page: Image.Image,
    zoom: tuple[float, float],
    boxes: Sequence[Box | None],
    shares: Tensor,
    title: str,
    labels: dict[int, str],
) -> Image.Image:
    """The page under the mixed colours of its tokens, shares [3, n], below a line that sums them up."""
    veil = Image.new("RGBA", page.size)
    pencil = ImageDraw.Draw(veil)
    for box, mix in zip(boxes, shares.T.tolist()):
        if box is None:
            continue
        x0, y0, x1, y1 = (round(edge * zoom[i % 2]) for i, edge in enumerate(box))
        gap = int(min(x1 - x0, y1 - y0) >= 8)  # shows where one patch ends, unless patches are tiny
        if x1 - gap > x0 and y1 - gap > y0:
            pencil.rectangle((x0, y0, x1 - 1 - gap, y1 - 1 - gap), fill=_mixed(mix))
    seen = shares[:, [box is not None for box in boxes]]  # [3, patches]
    means = seen.mean(dim=1).tolist() if seen.shape[1] else [0.0] * 3
    parts = ", ".join(f"{label} {means[i]:.0%}" for i, label in reversed(labels.items()))
    panel = Image.new("RGB", (max(page.width, _NARROW), _LINE + page.height), "white")
    _write(panel, (0, 0), f"{title}: {parts} of {seen.shape[1]} patches")
    panel.paste(Image.alpha_composite(page.convert("RGBA"), veil).convert("RGB"), (0, _LINE))
    return panel


def _mixed(shares: Sequence[float]) -> tuple[int, int, int, int]:
    """The states' colours, each as opaque as its share."""
    weights = [share * opacity for share, (_, opacity) in zip(shares, _COLOURS)]
    alpha = sum(weights)
    rgb = (sum(w * colour[i] for w, (colour, _) in zip(weights, _COLOURS)) / alpha for i in range(3))
    return (*(round(channel) for channel in rgb), round(255 * alpha))


def _legend(labels: dict[int, str]) -> Image.Image:
    legend = Image.new("RGB", (2 * _NARROW, _LINE), "white")
    x = 0
    for i, label in reversed(labels.items()):
        swatch = Image.new("RGBA", (_LINE, _TEXT), _mixed([float(i == j) for j in range(3)]))
        legend.paste(swatch, (x, (_LINE - _TEXT) // 2), swatch)
        x = _write(legend, (x + _LINE + 8, 0), label) + _GAP
    _write(legend, (x, 0), "mixed colours: layers or heads differ; no colour: not seen by the model")
    return legend


def _write(on: Image.Image, corner: tuple[int, int], text: str) -> int:
    """Write a line and return where it ends."""
    font, pencil = ImageFont.load_default(size=_TEXT), ImageDraw.Draw(on)
    pencil.text((corner[0], corner[1] + _LINE // 2), text, fill="black", font=font, anchor="lm")
    return corner[0] + round(pencil.textlength(text, font=font))


def _sheet(legend: Image.Image, rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """Panels row by row under the legend, on white, with gaps between them and around."""
    lines = [[legend], *rows]
    widths = [sum(panel.width + _GAP for panel in line) for line in lines]
    heights = [max(panel.height for panel in line) + _GAP for line in lines]
    sheet = Image.new("RGB", (max(widths) + _GAP, sum(heights) + _GAP), "white")
    y = _GAP
    for line, height in zip(lines, heights):
        x = _GAP
        for panel in line:
            sheet.paste(panel, (x, y))
            x += panel.width + _GAP
        y += height
    return sheet
