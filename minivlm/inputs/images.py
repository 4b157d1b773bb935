"""From an image file to CLIP's pixel values: safe loading, LLaVA-1.5's crop, LLaVA-NeXT's tiles.

Pixel values are bit-identical to those of the PIL backend of transformers' `CLIPImageProcessor`,
`LlavaImageProcessor` and `LlavaNextImageProcessor`. Their settings come from a checkpoint's
`preprocessor_config.json`, or nested in its `processor_config.json`. An image *file* is turned
upright by its EXIF tag, as transformers' `load_image` does; a `PIL.Image` is taken as it is.
Transparent pixels become white, as in the image processors. All sizes are (height, width).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from minivlm.errors import UserError
from minivlm.model import anyres
from minivlm.model.config import VLMConfig

_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
# Scaling up the short edge makes a thin image enormous. This many pixels take 1 GiB in Pillow.
_MAX_RESIZED_PIXELS = 1 << 28

Resize = int | tuple[int, int]  # the length of the shortest edge, or an exact (height, width)


@dataclass(frozen=True)
class ImageSettings:
    """What `preprocessor_config.json` says, checked against the model's configuration."""

    tile: int  # side, in pixels, of the square that the vision tower sees
    resize: Resize
    resample: Image.Resampling
    rescale: float  # factor from bytes to numbers around 1
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    pad_to_square: bool  # LLaVA-1.5 only: pad with the mean colour instead of cropping

    @classmethod
    def from_dict(cls, raw: Mapping, config: VLMConfig, name: str, pad_to_square: bool | None = None) -> ImageSettings:
        """Read an image processor's dictionary, which comes from the file `name`.

        Missing keys have the defaults of transformers. With `pad_to_square` None, the file decides.
        Raises `UserError`, naming the key, for a value that is not supported or does not fit the
        model.
        """
        for key in ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb"):
            if not raw.get(key, True):
                raise UserError(f"{name}: {key} false is not supported (expected true)")
        _check_pinpoints(raw, config, name)
        return cls(
            tile=config.vision.image_size,
            resize=_resize(raw, config, name),
            resample=_resample(raw, name),
            rescale=_rescale(raw, name),
            mean=_channels(raw, "image_mean", _CLIP_MEAN, name),
            std=_channels(raw, "image_std", _CLIP_STD, name),
            pad_to_square=_pads_to_square(raw, config, pad_to_square),
        )


def load_image(source: str | os.PathLike | Image.Image) -> Image.Image:
    """An image with its pixels read, turned upright if it comes from a file.

    Raises `UserError` for a file that is missing, damaged, not an image, suspiciously large, or of
    several pages.
    """
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
    except Exception as error:  # on damaged data, decoders raise OSError, SyntaxError, struct.error, ...
        raise UserError(f"{name}: the image cannot be read ({' '.join(str(error).split())})") from None
    if not image.width or not image.height:
        raise UserError(f"{name}: the image is empty ({image.width}x{image.height} pixels)")
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """The image with three channels; transparent pixels become white.

    Raises `UserError` for a mode that Pillow cannot convert.
    """
    try:
        if "A" in image.getbands() or image.info.get("transparency") is not None:
            white = Image.new("RGBA", image.size, (255, 255, 255, 255))
            image = Image.alpha_composite(white, image.convert("RGBA"))
        return image.convert("RGB")
    except ValueError as error:
        raise UserError(f"an image of mode {image.mode!r} cannot become RGB ({error})") from None


def pixel_values(images: Sequence[Image.Image], settings: ImageSettings, config: VLMConfig) -> Tensor:
    """The float32 pixel values of images: [I, 3, s, s], or for LLaVA-NeXT [I, tiles, 3, s, s].

    Tile 0 is the base view. Images with fewer tiles than others end in zero tiles. Raises
    `UserError` for an image of extreme proportions.
    """
    if not config.is_next:
        return _to_tensor([_cropped(to_rgb(image), settings) for image in images], settings)
    tiled = [_to_tensor(_tiles(to_rgb(image), settings, config), settings) for image in images]
    return torch.nn.utils.rnn.pad_sequence(tiled, batch_first=True)


def _read(path: Path) -> Image.Image:
    with Image.open(path) as image:
        # In an MPO file, a phone's JPEG, the second frame is a preview. In any other file, taking
        # the first frame would silently lose pages.
        frames = getattr(image, "n_frames", 1)
        if frames > 1 and image.format != "MPO":
            raise UserError(f"{path}: holds {frames} frames or pages (expected one image)")
        image.load()
        return ImageOps.exif_transpose(image)


def _cropped(image: Image.Image, settings: ImageSettings) -> Image.Image:
    """LLaVA-1.5: resize the image, then cut out the tile in its middle."""
    if settings.pad_to_square:
        image = _padded_to_square(image, tuple(int(channel * 255) for channel in settings.mean))
    height, width = _resized_size(image, settings)
    if height * width > _MAX_RESIZED_PIXELS:
        size = f"{image.width}x{image.height}"
        raise UserError(f"an image of {size} pixels is too thin: resized it is {width}x{height}")
    image = image.resize((width, height), settings.resample)
    top = (height - settings.tile) // 2
    left = (width - settings.tile) // 2
    return image.crop((left, top, left + settings.tile, top + settings.tile))


def _resized_size(image: Image.Image, settings: ImageSettings) -> anyres.Size:
    """(height, width) of the image after resizing."""
    if not isinstance(settings.resize, int):
        return settings.resize
    short, long = sorted(image.size)
    longer = int(settings.resize * long / short)
    return (longer, settings.resize) if image.width <= image.height else (settings.resize, longer)


def _padded_to_square(image: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    side = max(image.size)
    if side * side > _MAX_RESIZED_PIXELS:
        size = f"{image.width}x{image.height}"
        raise UserError(f"an image of {size} pixels is too large to be padded to a square")
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def _tiles(image: Image.Image, settings: ImageSettings, config: VLMConfig) -> list[Image.Image]:
    """LLaVA-NeXT: the base view, then the tiles of the best resolution, line by line."""
    size, tile = (image.height, image.width), settings.tile
    # 1) The base view is the whole image, squashed to one tile.
    base = image.resize((tile, tile), settings.resample)
    # 2) The image is fitted into its best resolution. The padding is black, before it is
    #    normalised.
    height, width = anyres.best_resolution(size, config.image_grid_pinpoints)
    fitted_h, fitted_w = anyres.fitted_size(size, (height, width))
    top, left = anyres.padding_before((fitted_h, fitted_w), (height, width))
    canvas = Image.new("RGB", (width, height))
    canvas.paste(image.resize((fitted_w, fitted_h), settings.resample), (left, top))
    # 3) The canvas is cut into tiles.
    corners = [(x, y) for y in range(0, height, tile) for x in range(0, width, tile)]
    return [base] + [canvas.crop((x, y, x + tile, y + tile)) for x, y in corners]


def _to_tensor(tiles: Sequence[Image.Image], settings: ImageSettings) -> Tensor:
    """RGB squares -> normalised pixel values [n, 3, s, s]."""
    # Each step rounds where the reference rounds: products in float64, the rest in float32.
    raw = torch.frombuffer(bytearray(b"".join(tile.tobytes() for tile in tiles)), dtype=torch.uint8)
    values = raw.view(len(tiles), settings.tile, settings.tile, 3).permute(0, 3, 1, 2)  # [n, 3, s, s]
    values = values.to(torch.float64, memory_format=torch.contiguous_format) * settings.rescale
    mean = torch.tensor(settings.mean).view(3, 1, 1)
    std = torch.tensor(settings.std).view(3, 1, 1)
    return values.to(torch.float32).sub_(mean).div_(std)


# Readers of single settings


def _check_pinpoints(raw: Mapping, config: VLMConfig, name: str) -> None:
    """LLaVA-NeXT's files state the resolutions twice; the two have to agree."""
    pinpoints = raw.get("image_grid_pinpoints")
    if not config.is_next or pinpoints is None:
        return
    if [tuple(pinpoint) for pinpoint in pinpoints] != list(config.image_grid_pinpoints):
        raise UserError(f"{name}: image_grid_pinpoints {pinpoints} differ from those of config.json")


def _resize(raw: Mapping, config: VLMConfig, name: str) -> Resize:
    """`size`, checked against `crop_size` and the model's tile."""
    tile = config.vision.image_size
    crop = _size(raw, "crop_size", 224, name)
    crop = (crop, crop) if isinstance(crop, int) else crop
    if crop != (tile, tile):
        raise UserError(f"{name}: crop_size {crop} is not the image_size {tile} of config.json's vision_config")
    resize = _size(raw, "size", 224, name)
    if resize in (tile, (tile, tile)):
        return resize
    # LLaVA-1.5 may resize to more than a tile and crop the rest; LLaVA-NeXT's tiles are never
    # cropped.
    shortest = resize if isinstance(resize, int) else min(resize)
    if config.is_next or shortest < tile:
        raise UserError(f"{name}: size {raw.get('size', 224)!r} does not fit crop_size {tile}")
    return resize


def _size(raw: Mapping, key: str, default: int, name: str) -> Resize:
    """A size written as `336`, `{"shortest_edge": 336}` or `{"height": 336, "width": 336}`."""
    value = raw.get(key)
    size: Any = default if value is None else value
    if isinstance(value, Mapping):
        given = {edge: length for edge, length in value.items() if length is not None}
        if set(given) == {"shortest_edge"}:
            size = given["shortest_edge"]
        elif set(given) == {"height", "width"}:
            size = (given["height"], given["width"])
    sides = size if isinstance(size, tuple) else (size,)
    if not all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in sides):
        raise UserError(f"{name}: {key} {value!r} is not supported (expected a shortest_edge, or height and width)")
    return size


def _resample(raw: Mapping, name: str) -> Image.Resampling:
    try:
        return Image.Resampling(raw.get("resample", Image.Resampling.BICUBIC))
    except ValueError:
        raise UserError(f"{name}: resample {raw['resample']!r} is not one of Pillow's filters 0 to 5") from None


def _rescale(raw: Mapping, name: str) -> float:
    factor = raw.get("rescale_factor", 1 / 255)
    if not isinstance(factor, (int, float)) or factor <= 0:
        raise UserError(f"{name}: rescale_factor {factor!r} is not a positive number")
    return float(factor)


def _channels(raw: Mapping, key: str, default: tuple[float, float, float], name: str) -> tuple[float, float, float]:
    """One number for each of red, green and blue."""
    value = raw.get(key) or default
    if not isinstance(value, Sequence) or len(value) != 3 or not all(isinstance(v, (int, float)) for v in value):
        raise UserError(f"{name}: {key} {value!r} is not a list of three numbers")
    if key == "image_std" and not all(value):
        raise UserError(f"{name}: image_std {value!r} has a zero")
    red, green, blue = value
    return float(red), float(green), float(blue)


def _pads_to_square(raw: Mapping, config: VLMConfig, asked: bool | None) -> bool:
    """Whether images are padded to a square: as `asked` or, if that is None, as the file says."""
    if asked is None:
        # Only for this processor does `do_pad` mean padding to a square.
        processor_type = str(raw.get("image_processor_type", "")).removesuffix("Fast").removesuffix("Pil")
        asked = bool(raw.get("do_pad", False)) and processor_type == "LlavaImageProcessor"
    if asked and config.is_next:
        raise UserError("pad_to_square has no meaning for llava_next: its tiles never lose a margin")
    return asked
