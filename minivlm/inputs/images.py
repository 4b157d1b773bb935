"""From an image file to CLIP's pixel values: safe loading, LLaVA-1.5's crop, LLaVA-NeXT's tiles.

Pixel values are bit-identical to those of the PIL backend of transformers' `CLIPImageProcessor`,
`LlavaImageProcessor` and `LlavaNextImageProcessor`, for images of at most 8 bits a channel; deeper
ones, which those turn white or black, are scaled to 8 bits first. An image *file* is turned upright
by its EXIF tag, as transformers' `load_image` does; a `PIL.Image` is taken as it is. Transparent
pixels become white, as in the image processors. All sizes are (height, width).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from minivlm.errors import UserError
from minivlm.files import open_file, reason
from minivlm.inputs.image_settings import MAX_RESIZED_PIXELS, ImageSettings
from minivlm.model import anyres
from minivlm.model.config import VLMConfig

# What photographs and pages come in. Pillow knows many more formats, some of which start other programs (EPS).
_FORMATS = ("PNG", "JPEG", "GIF", "BMP", "PPM", "TIFF", "WEBP", "JPEG2000", "AVIF")  # a phone's MPO is a JPEG
_LIBTIFF = threading.Lock()  # images are read in several threads
LONGEST_EDGE = 1 << 18  # pixels. Resizing a longer edge alone takes gigabytes, and such an image is a line.


def load_image(source: str | os.PathLike | Image.Image) -> Image.Image:
    """An RGB image with its pixels read, turned upright if it comes from a file.

    Raises `UserError` for a file that is missing, damaged, not an image, suspiciously large, or of
    several pages, and for an image that cannot become RGB.
    """
    if isinstance(source, Image.Image):
        _check_size(source, "image")
        return _loaded(source, "image")
    path = Path(source)
    with open_file(path) as file:
        return read_image(file, str(path))


def read_image(file: BinaryIO, name: str) -> Image.Image:
    """As `load_image`, from an open file or bytes in memory. Errors begin with `name`."""
    try:
        with Image.open(file, formats=_FORMATS) as image:
            # In an MPO file, a phone's JPEG, the second frame is a preview. In any other file, taking
            # the first frame would silently lose pages.
            if getattr(image, "is_animated", False) and image.format != "MPO":
                raise UserError(f"{name}: holds several frames or pages (expected one image)")
            _check_size(image, name)
            with _silent_libtiff() if image.format == "TIFF" else nullcontext():
                image.load()
            return _loaded(ImageOps.exif_transpose(image), name)
    except UnidentifiedImageError:
        raise UserError(f"{name}: not an image, or damaged (expected {', '.join(_FORMATS)})") from None
    except Image.DecompressionBombError:
        raise _bomb(name) from None
    except UserError:
        raise
    except Exception as error:  # on damaged data, decoders raise OSError, SyntaxError, struct.error, ...
        raise UserError(f"{name}: the image cannot be read ({reason(error)})") from None


@contextmanager
def _silent_libtiff() -> Iterator[None]:
    """Without what libtiff prints of damaged files, which goes to the process's standard error, past Python."""
    with _LIBTIFF:
        try:
            kept = os.dup(2)
        except OSError:  # there is no standard error
            yield
            return
        try:
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), 2)
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def _loaded(image: Image.Image, name: str) -> Image.Image:
    """The image in RGB; transparent pixels become white."""
    try:
        image.load()
        if image.mode[:1] in ("I", "F"):
            image = _eight_bits(image)
        if "A" in image.getbands() or image.info.get("transparency") is not None:
            white = Image.new("RGBA", image.size, (255, 255, 255, 255))
            image = Image.alpha_composite(white, image.convert("RGBA"))
        return image if image.mode == "RGB" else image.convert("RGB")
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    except Exception as error:
        raise UserError(f"{name}: the image cannot be read as RGB ({reason(error)})") from None


def _check_size(image: Image.Image, name: str) -> None:
    width, height = image.size
    if not width or not height:
        raise UserError(f"{name}: the image is empty ({width}x{height} pixels)")
    if Image.MAX_IMAGE_PIXELS is not None and width * height > Image.MAX_IMAGE_PIXELS:
        raise _bomb(name)
    if max(width, height) > LONGEST_EDGE:
        raise UserError(f"{name}: an edge of {max(width, height)} pixels (expected at most {LONGEST_EDGE})")


def _bomb(name: str) -> UserError:
    limit = Image.MAX_IMAGE_PIXELS
    return UserError(f"{name}: more than {limit} pixels, which Pillow takes for a decompression bomb")


def _eight_bits(image: Image.Image) -> Image.Image:
    """A grey image of 16 or 32 bits, or of floats, in 8 bits.

    16 bits are divided by 257, which maps white to white and is the inverse of how 8 bits become
    16. The other modes do not say what white is: it is the smallest of 1 (only for floats), 255 and
    65535 that no pixel exceeds. Raises `UserError` for pixels beyond that, negative or not finite.
    """
    values = np.asarray(image)
    whites = (65535,) if image.mode.startswith("I;16") else (255, 65535) if image.mode == "I" else (1, 255, 65535)
    low, high = values.min(), values.max()
    white = next((white for white in whites if low >= 0 and high <= white), None)
    if white is None:
        raise UserError(f"its pixels range from {low:g} to {high:g} (expected 0 to {' or '.join(map(str, whites))})")
    grey = np.rint(values.astype(np.float32) * np.float32(255 / white)).astype(np.uint8)
    if isinstance(transparent := image.info.get("transparency"), int):
        grey[values == transparent] = 255
    return Image.fromarray(grey)


def pixel_values(images: Sequence[Image.Image], settings: ImageSettings, config: VLMConfig) -> Tensor:
    """The float32 pixel values of RGB images: [I, 3, s, s], or for LLaVA-NeXT [I, tiles, 3, s, s].

    The images are those of `load_image`. Tile 0 is the base view. Images with fewer tiles than
    others end in zero tiles. Raises `UserError` for an image of extreme proportions.
    """
    if not config.is_next:
        return _to_tensor([_cropped(image, settings) for image in images], settings)
    tiled = [_to_tensor(_tiles(image, settings, config), settings) for image in images]
    return torch.nn.utils.rnn.pad_sequence(tiled, batch_first=True)


def _cropped(image: Image.Image, settings: ImageSettings) -> Image.Image:
    """LLaVA-1.5: resize the image, then cut out the tile in its middle."""
    if settings.pad_to_square:
        image = _padded_to_square(image, tuple(int(channel * 255) for channel in settings.mean))
    height, width = _resized_size(image, settings)
    if height * width > MAX_RESIZED_PIXELS:
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
    if side * side > MAX_RESIZED_PIXELS:
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
    raw = torch.frombuffer(bytearray(b"".join(tile.tobytes() for tile in tiles)), dtype=torch.uint8)
    return settings.normalised(raw.view(len(tiles), settings.tile, settings.tile, 3).permute(0, 3, 1, 2))
