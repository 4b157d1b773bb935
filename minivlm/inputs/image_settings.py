"""How a checkpoint wants its images prepared: what `preprocessor_config.json` says, checked against the model.

The settings may also be nested in `processor_config.json`. Missing keys have the defaults of transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import msgspec
import torch
from msgspec import Meta
from PIL import Image
from torch import Tensor

from minivlm.errors import UserError
from minivlm.model.config import VLMConfig
from minivlm.schema import Positive, convert

_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
# Scaling up the short edge makes a thin image enormous. This many pixels take 1 GiB in Pillow.
MAX_RESIZED_PIXELS = 1 << 28

Resize = int | tuple[int, int]  # the length of the shortest edge, or an exact (height, width)
_Channel = Annotated[float, Meta(ge=-1e6, le=1e6)]
_Channels = tuple[_Channel, _Channel, _Channel]  # of red, green and blue
_Side = Annotated[int, Meta(gt=0, le=MAX_RESIZED_PIXELS)]
_Size = _Side | dict[str, _Side | None] | None  # 336, {"shortest_edge": 336} or {"height": 336, "width": 336}


class _File(msgspec.Struct):
    """The keys that are read."""

    do_resize: bool = True
    do_center_crop: bool = True
    do_rescale: bool = True
    do_normalize: bool = True
    do_convert_rgb: bool = True
    do_pad: bool | None = None
    image_processor_type: str | None = None
    image_grid_pinpoints: list[tuple[int, int]] | None = None
    size: _Size = None
    crop_size: _Size = None
    resample: Annotated[int, Meta(ge=0, le=5)] = Image.Resampling.BICUBIC.value
    rescale_factor: Positive = 1 / 255
    image_mean: _Channels | None = None
    image_std: _Channels | None = None


@dataclass(frozen=True)
class ImageSettings:
    """What the file says, checked against the model's configuration."""

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

        With `pad_to_square` None, the file decides. Raises `UserError`, naming the key, for a value
        that is malformed, not supported, or does not fit the model.
        """
        file = convert(raw, _File, name)
        for key in ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb"):
            if not getattr(file, key):
                raise UserError(f"{name}: {key} false is not supported (expected true)")
        # LLaVA-NeXT's files state the resolutions twice; the two have to agree.
        pinpoints = file.image_grid_pinpoints
        if config.is_next and pinpoints is not None and pinpoints != list(config.image_grid_pinpoints):
            raise UserError(f"{name}: image_grid_pinpoints {pinpoints} differ from those of config.json")
        settings = cls(
            tile=config.vision.image_size,
            resize=_resize(file, config, name),
            resample=Image.Resampling(file.resample),
            rescale=file.rescale_factor,
            mean=file.image_mean or _CLIP_MEAN,
            std=file.image_std or _CLIP_STD,
            pad_to_square=_pads_to_square(file, config, pad_to_square),
        )
        black_and_white = settings.normalised(torch.tensor([0, 255], dtype=torch.uint8).expand(1, 3, 1, 2))
        if not bool(black_and_white.isfinite().all()):
            raise UserError(f"{name}: image_std, image_mean and rescale_factor give pixels that are no numbers")
        return settings

    def normalised(self, pixels: Tensor) -> Tensor:
        """The float32 pixel values of bytes [n, 3, h, w]."""
        # Each step rounds where the reference rounds: products in float64, the rest in float32.
        values = pixels.to(torch.float64, memory_format=torch.contiguous_format) * self.rescale
        mean = torch.tensor(self.mean).view(3, 1, 1)
        std = torch.tensor(self.std).view(3, 1, 1)
        return values.to(torch.float32).sub_(mean).div_(std)


def _resize(file: _File, config: VLMConfig, name: str) -> Resize:
    """`size`, checked against `crop_size` and the model's tile."""
    tile = config.vision.image_size
    crop = _size(file.crop_size, "crop_size", name)
    crop = (crop, crop) if isinstance(crop, int) else crop
    if crop != (tile, tile):
        raise UserError(f"{name}: crop_size {crop} is not the image_size {tile} of config.json's vision_config")
    resize = _size(file.size, "size", name)
    if resize in (tile, (tile, tile)):
        return resize
    # LLaVA-1.5 may resize to more than a tile and crop the rest; LLaVA-NeXT's tiles are never
    # cropped.
    height, width = (resize, resize) if isinstance(resize, int) else resize
    if config.is_next or min(height, width) < tile or height * width > MAX_RESIZED_PIXELS:
        raise UserError(f"{name}: size {resize} does not fit crop_size {tile}")
    return resize


def _size(value: _Size, key: str, name: str) -> Resize:
    if value is None:
        return 224
    if isinstance(value, int):
        return value
    given = {edge: length for edge, length in value.items() if length is not None}
    if set(given) == {"shortest_edge"}:
        return given["shortest_edge"]
    if set(given) == {"height", "width"}:
        return given["height"], given["width"]
    raise UserError(f"{name}: {key} {value} is not supported (expected a shortest_edge, or height and width)")


def _pads_to_square(file: _File, config: VLMConfig, asked: bool | None) -> bool:
    """Whether images are padded to a square: as `asked` or, if that is None, as the file says."""
    if asked is None:
        # Only for this processor does `do_pad` mean padding to a square.
        processor_type = (file.image_processor_type or "").removesuffix("Fast").removesuffix("Pil")
        asked = bool(file.do_pad) and processor_type == "LlavaImageProcessor"
    if asked and config.is_next:
        raise UserError("pad_to_square has no meaning for llava_next: its tiles never lose a margin")
    return asked
