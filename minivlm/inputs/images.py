"""From an image file to the pixel values of CLIP: safe loading, LLaVA-1.5 crops, LLaVA-NeXT tiles.

Bit-identical to the PIL backend of transformers' `CLIPImageProcessor` / `LlavaImageProcessor` and
`LlavaNextImageProcessor`, whose settings are read from a checkpoint's `preprocessor_config.json`
(flat) or `processor_config.json` (nested).  A *file* is turned upright by its EXIF tag, as
transformers' `load_image` does; an image that is already a `PIL.Image` is taken as it is.  In both
cases transparency is laid on white, as the image processors do.  All sizes are (height, width).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from minivlm.errors import UserError
from minivlm.model import anyres
from minivlm.model.config import VLMConfig

_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
# Scaling the short edge up makes a thin image enormous; this many pixels take 1 GiB in Pillow.
_MAX_RESIZED_PIXELS = 1 << 28


@dataclass(frozen=True)
class ImageSettings:
    """What `preprocessor_config.json` says, checked against what the model was built for."""

    tile: int  # side of the square the vision tower sees
    resize: int | tuple[int, int]  # the shortest edge, or an exact (height, width)
    resample: Image.Resampling
    rescale: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    pad_to_square: bool  # LLaVA-1.5 only: pad with the mean colour, as the original LLaVA, instead of cropping margins

    @classmethod
    def from_dict(cls, raw: Mapping, config: VLMConfig, name: str, pad_to_square: bool | None = None) -> ImageSettings:
        """Read the image processor's dictionary, found in the file `name`; missing keys take the reference's defaults.

        `pad_to_square` None means what the file says.  Raises `UserError` naming the key that is not
        supported or does not fit the model.
        """
        for key in ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb"):
            if not raw.get(key, True):
                raise UserError(f"{name}: {key} false is not supported (expected true)")
        tile = config.vision.image_size
        resize, crop = _size(raw, "size", 224, name), _size(raw, "crop_size", 224, name)
        crop = (crop, crop) if isinstance(crop, int) else crop
        if crop != (tile, tile):
            raise UserError(f"{name}: crop_size {crop} is not the image_size {tile} of config.json's vision_config")
        if resize not in (tile, (tile, tile)) and (config.is_next or _short(resize) < tile):
            raise UserError(f"{name}: size {raw.get('size', 224)!r} does not fit crop_size {tile}")
        pinpoints = raw.get("image_grid_pinpoints")
        if (
            config.is_next
            and pinpoints is not None
            and [tuple(p) for p in pinpoints] != list(config.image_grid_pinpoints)
        ):
            raise UserError(f"{name}: image_grid_pinpoints {pinpoints} differ from those of config.json")
        try:
            resample = Image.Resampling(raw.get("resample", 3))
        except ValueError:
            raise UserError(f"{name}: resample {raw['resample']!r} is not one of Pillow's filters 0 to 5") from None
        rescale = raw.get("rescale_factor", 1 / 255)
        if not isinstance(rescale, (int, float)) or rescale <= 0:
            raise UserError(f"{name}: rescale_factor {rescale!r} is not a positive number")
        if pad_to_square is None:
            # Only this processor gives `do_pad` the meaning "to a square".
            kind = str(raw.get("image_processor_type", "")).removesuffix("Fast").removesuffix("Pil")
            pad_to_square = bool(raw.get("do_pad", False)) and kind == "LlavaImageProcessor"
        if pad_to_square and config.is_next:
            raise UserError("pad_to_square has no meaning for llava_next: its tiles never lose a margin")
        return cls(
            tile=tile,
            resize=resize,
            resample=resample,
            rescale=float(rescale),
            mean=_channels(raw, "image_mean", _CLIP_MEAN, name),
            std=_channels(raw, "image_std", _CLIP_STD, name),
            pad_to_square=pad_to_square,
        )


def load_image(source: str | os.PathLike | Image.Image) -> Image.Image:
    """An image with its pixels read, upright if it comes from a file; raises `UserError` if that is not possible."""
    name = "image" if isinstance(source, Image.Image) else str(source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            if isinstance(source, Image.Image):
                image = source
                image.load()
            else:
                image = _read(Path(source))
    except FileNotFoundError:
        raise UserError(f"{name}: no such file") from None
    except UnidentifiedImageError:
        raise UserError(f"{name}: not an image that Pillow can read") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        limit = Image.MAX_IMAGE_PIXELS
        raise UserError(f"{name}: more than {limit} pixels, which Pillow takes for a decompression bomb") from None
    except UserError:
        raise
    except Exception as error:  # decoders raise OSError, ValueError, SyntaxError, struct.error, ... on damaged data
        raise UserError(f"{name}: the image cannot be read ({' '.join(str(error).split())})") from None
    if not image.width or not image.height:
        raise UserError(f"{name}: the image is empty ({image.width}x{image.height} pixels)")
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Three channels; anything transparent is laid on white."""
    try:
        if "A" in image.getbands() or image.info.get("transparency") is not None:
            white = Image.new("RGBA", image.size, (255, 255, 255, 255))
            image = Image.alpha_composite(white, image.convert("RGBA"))
        return image.convert("RGB")
    except ValueError as error:
        raise UserError(f"an image of mode {image.mode!r} cannot become RGB ({error})") from None


def pixel_values(images: Sequence[Image.Image], settings: ImageSettings, config: VLMConfig) -> Tensor:
    """Images -> float32 pixel values: [I, 3, s, s], or for LLaVA-NeXT [I, tiles, 3, s, s].

    The base view is tile 0; an image with fewer tiles than the others is filled up with zero tiles.
    """
    if not config.is_next:
        return _to_tensor([_crop(to_rgb(image), settings) for image in images], settings)
    tiled = [_to_tensor(_tiles(to_rgb(image), settings, config), settings) for image in images]
    return torch.nn.utils.rnn.pad_sequence(tiled, batch_first=True)


def _read(path: Path) -> Image.Image:
    with Image.open(path) as image:
        # A phone's JPEG may carry a preview as second frame (MPO); other frames would be silently lost pages.
        if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
            raise UserError(f"{path}: holds {image.n_frames} frames or pages (expected one image)")
        image.load()
        return ImageOps.exif_transpose(image)


def _crop(image: Image.Image, settings: ImageSettings) -> Image.Image:
    """LLaVA-1.5: the shortest edge to `resize`, then the central square."""
    if settings.pad_to_square:
        image = _padded_to_square(image, tuple(int(channel * 255) for channel in settings.mean))
    height, width = _resized(image, settings)
    if height * width > _MAX_RESIZED_PIXELS:
        raise UserError(f"an image of {image.width}x{image.height} pixels is too thin: resized it is {width}x{height}")
    image = image.resize((width, height), settings.resample)
    top, left = (height - settings.tile) // 2, (width - settings.tile) // 2
    return image.crop((left, top, left + settings.tile, top + settings.tile))


def _resized(image: Image.Image, settings: ImageSettings) -> anyres.Size:
    if not isinstance(settings.resize, int):
        return settings.resize
    short, long = sorted(image.size)
    longer = int(settings.resize * long / short)
    return (longer, settings.resize) if image.width <= image.height else (settings.resize, longer)


def _padded_to_square(image: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    side = max(image.size)
    if side * side > _MAX_RESIZED_PIXELS:
        raise UserError(f"an image of {image.width}x{image.height} pixels is too large to be padded to a square")
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def _tiles(image: Image.Image, settings: ImageSettings, config: VLMConfig) -> list[Image.Image]:
    """LLaVA-NeXT: the whole image squashed to one tile, then the tiles of its best resolution, row by row."""
    size, tile = (image.height, image.width), settings.tile
    height, width = target = anyres.best_resolution(size, config.image_grid_pinpoints)
    fitted = anyres.fitted_size(size, target)
    top, left = anyres.padding_before(fitted, target)
    canvas = Image.new("RGB", (width, height))  # zeros: padding becomes black before it is normalised
    canvas.paste(image.resize(fitted[::-1], settings.resample), (left, top))
    base = image.resize((tile, tile), settings.resample)
    corners = [(x, y) for y in range(0, height, tile) for x in range(0, width, tile)]
    return [base] + [canvas.crop((x, y, x + tile, y + tile)) for x, y in corners]


def _to_tensor(tiles: Sequence[Image.Image], settings: ImageSettings) -> Tensor:
    """RGB squares -> normalised [n, 3, s, s]; each step rounds where the reference rounds."""
    raw = torch.frombuffer(bytearray(b"".join(tile.tobytes() for tile in tiles)), dtype=torch.uint8)
    values = raw.view(len(tiles), settings.tile, settings.tile, 3).permute(0, 3, 1, 2)  # [n, 3, s, s]
    values = (values.to(torch.float64, memory_format=torch.contiguous_format) * settings.rescale).to(torch.float32)
    return values.sub_(torch.tensor(settings.mean).view(3, 1, 1)).div_(torch.tensor(settings.std).view(3, 1, 1))


def _short(size: int | tuple[int, int]) -> int:
    return size if isinstance(size, int) else min(size)


def _size(raw: Mapping, key: str, default: int, name: str) -> int | tuple[int, int]:
    """`336`, `{"shortest_edge": 336}` or `{"height": 336, "width": 336}`."""
    value = raw.get(key, default)
    value = default if value is None else value
    found: object = value
    if isinstance(value, Mapping):
        given = {k: v for k, v in value.items() if v is not None}
        if set(given) == {"shortest_edge"}:
            found = given["shortest_edge"]
        elif set(given) == {"height", "width"}:
            found = (given["height"], given["width"])
    sides = found if isinstance(found, tuple) else (found,)
    if not all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in sides):
        raise UserError(f"{name}: {key} {value!r} is not supported (expected a shortest_edge, or height and width)")
    return found


def _channels(raw: Mapping, key: str, default: tuple[float, float, float], name: str) -> tuple[float, float, float]:
    value = raw.get(key) or default
    if not isinstance(value, Sequence) or len(value) != 3 or not all(isinstance(v, (int, float)) for v in value):
        raise UserError(f"{name}: {key} {value!r} is not a list of three numbers")
    if key == "image_std" and not all(value):
        raise UserError(f"{name}: image_std {value!r} has a zero")
    return tuple(float(v) for v in value)
