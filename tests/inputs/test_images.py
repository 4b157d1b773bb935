"""Pixel values, bit for bit, against transformers' PIL image processors; frozen hashes; and bad images."""

import hashlib
import itertools
import random

import pytest
import torch
from PIL import Image, ImageOps

from minivlm.errors import UserError
from minivlm.inputs.images import ImageSettings, load_image, pixel_values
from minivlm.model.config import VLMConfig

# fmt: off
MODES = [
    "RGB", "L", "RGBA", "P", "LA", "CMYK", "1", "PA", "YCbCr", "HSV", "LAB", "RGBX", "RGBa",
]  # the deeper ones are not what transformers makes of them
BITS = {  # of a pixel; 32 in the other modes
    "1": 1, "L": 8, "P": 8, "RGB": 24, "YCbCr": 24, "LAB": 24, "HSV": 24, "LA": 16, "PA": 16,
}
# fmt: on


def config(family: str, tile: int = 56) -> VLMConfig:
    raw = {
        "model_type": family,
        "image_token_index": 5,
        "text_config": {"model_type": "llama"},
        "vision_config": {"model_type": "clip_vision_model", "image_size": tile, "patch_size": 14},
    }
    if family == "llava_next":
        raw["image_grid_pinpoints"] = [[tile * a, tile * b] for a, b in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))]
    return VLMConfig.from_dict(raw)


def settings_dict(tile: int = 56, **changes) -> dict:
    return {"size": {"shortest_edge": tile}, "crop_size": {"height": tile, "width": tile}, **changes}


def mine(images, family: str, tile: int = 56, **changes) -> torch.Tensor:
    model = config(family, tile)
    images = [load_image(image) for image in images]
    return pixel_values(images, ImageSettings.from_dict(settings_dict(tile, **changes), model, "test"), model)


def reference(images, family: str, tile: int = 56, **changes) -> torch.Tensor:
    """What transformers' PIL processor of the family makes of PIL images."""
    if family == "llava":
        module = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
        processor = module.CLIPImageProcessorPil(**settings_dict(tile, **changes))
    else:
        module = pytest.importorskip("transformers.models.llava_next.image_processing_pil_llava_next")
        pinpoints = [list(pair) for pair in config(family, tile).image_grid_pinpoints]
        processor = module.LlavaNextImageProcessorPil(**settings_dict(tile, image_grid_pinpoints=pinpoints, **changes))
    return processor(images, return_tensors="pt").pixel_values


def noise(mode: str, height: int, width: int, seed: int = 0) -> Image.Image:
    """Random pixels, with a palette, and with a transparent colour for every other P and RGB image."""
    rng = random.Random(f"{mode}{height}{width}{seed}")
    line_bytes = (width * BITS.get(mode, 32) + 7) // 8
    image = Image.frombytes(mode, (width, height), rng.randbytes(line_bytes * height))
    if mode in ("P", "PA"):
        image.putpalette(rng.randbytes(768))
    if mode in ("P", "RGB") and seed % 2:
        image.info["transparency"] = rng.randrange(256) if mode == "P" else image.getpixel((0, 0))
    return image


def cases() -> list[tuple[str, int, int]]:
    rng = random.Random(0)
    extreme = [("RGB", 1, 1), ("RGB", 1, 2000), ("RGB", 2000, 1), ("L", 2, 2000), ("RGB", 3000, 1000), ("RGB", 57, 56)]
    sizes = ((1, 1), (1, 90), (61, 1), (56, 56), (112, 56), (113, 171))
    every_mode = [(mode, *size) for mode in MODES for size in sizes]
    drawn = [(rng.choice(MODES), rng.randint(1, 240), rng.randint(1, 240)) for _ in range(220)]
    return extreme + every_mode + drawn


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_pixel_values_of_every_size_and_mode(family):
    assert len(cases()) >= 300
    for seed, (mode, height, width) in enumerate(cases()):
        image = noise(mode, height, width, seed)
        assert torch.equal(mine([image], family), reference([image], family)), (mode, height, width)


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_pixel_values_at_336(family):
    rng = random.Random(1)
    sizes = [(336, 336), (640, 480), (480, 640), (1100, 850), (100, 900), (1, 1)]
    sizes += [(rng.randint(1, 900), rng.randint(1, 900)) for _ in range(12)]
    for seed, (height, width) in enumerate(sizes):
        image = noise(rng.choice(["RGB", "L", "RGBA"]), height, width, seed)
        assert torch.equal(mine([image], family, 336), reference([image], family, 336)), (height, width)


def test_a_batch_is_padded_with_zero_tiles():
    images = [noise("RGB", 50, 50), noise("RGB", 200, 40), noise("RGB", 120, 120)]
    batch = mine(images, "llava_next")
    assert torch.equal(batch, reference(images, "llava_next"))
    assert batch.shape == (3, 5, 3, 56, 56) and not batch[0, 3:].any() and not batch[1, 4:].any()


@pytest.mark.parametrize("family", ["llava", "llava_next"])
@pytest.mark.parametrize(
    "changes",
    [
        {"resample": 0}, {"resample": 1}, {"resample": 2}, {"size": 56}, {"crop_size": 56},
        {"rescale_factor": 1 / 127.5}, {"size": {"height": 56, "width": 56}},
        {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.25, 0.125]},
    ],
)  # fmt: skip
def test_settings_mean_what_they_mean_to_the_reference(family, changes):
    images = [noise("RGB", 70, 130)]
    assert torch.equal(mine(images, family, **changes), reference(images, family, **changes))


def test_a_short_edge_longer_than_the_crop():
    images = [noise("RGB", 70, 131)]
    changes = {"size": {"shortest_edge": 64}}
    assert torch.equal(mine(images, "llava", **changes), reference(images, "llava", **changes))


@pytest.mark.parametrize("size", [(40, 90), (90, 41), (56, 56), (1, 7)])
def test_pad_to_square_is_the_original_llava(size):
    module = pytest.importorskip("transformers.models.llava.image_processing_pil_llava")
    images = [noise("RGB", *size)]
    expected = module.LlavaImageProcessorPil(**settings_dict(do_pad=True))(images, return_tensors="pt").pixel_values
    model = config("llava")
    settings = ImageSettings.from_dict(settings_dict(), model, "test", True)
    assert torch.equal(pixel_values(images, settings, model), expected)
    # The same from a checkpoint whose settings ask for it; CLIP's own `do_pad` means something else.
    assert torch.equal(mine(images, "llava", do_pad=True, image_processor_type="LlavaImageProcessorFast"), expected)
    by_clip = mine(images, "llava", do_pad=True, image_processor_type="CLIPImageProcessor")
    assert torch.equal(by_clip, mine(images, "llava"))


def test_defaults_are_clip_at_224():
    pytest.importorskip("transformers")
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    model, images = config("llava", 224), [noise("RGB", 130, 70)]
    settings = ImageSettings.from_dict({"image_processor_type": "CLIPImageProcessor"}, model, "test")
    expected = CLIPImageProcessorPil()(images, return_tensors="pt").pixel_values
    assert torch.equal(pixel_values(images, settings, model), expected)


def gradient(mode: str, height: int, width: int) -> Image.Image:
    """A page-like picture without random numbers: its pixels can never change between versions."""
    places = itertools.product(range(height), range(width), range(3))
    pixels = bytes((7 * x * x + 13 * y * (x % 5) + 40 * c) % 256 for y, x, c in places)
    return Image.frombytes("RGB", (width, height), pixels).convert(mode)


@pytest.mark.parametrize(
    "family, tile, mode, size, digest",
    [
        ("llava", 56, "RGB", (120, 75), "813eac59865ae352"),
        ("llava", 56, "L", (1, 9), "a3d8f9ca7b393c01"),
        ("llava", 336, "RGB", (90, 130), "f634146b8d250391"),
        ("llava_next", 56, "RGB", (120, 75), "65f193f5d343ab03"),
        ("llava_next", 56, "CMYK", (33, 150), "5a4ce7df259ff39f"),
        ("llava_next", 336, "RGB", (130, 90), "4ef3e7d451daf55e"),
    ],
)
def test_frozen_pixel_values(family, tile, mode, size, digest):
    values = mine([gradient(mode, *size)], family, tile)
    assert hashlib.sha256(bytes(values.flatten().view(torch.uint8).tolist())).hexdigest()[:16] == digest


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_file_is_turned_upright_and_an_image_is_not(tmp_path, orientation):
    upright, path = noise("RGB", 40, 70), tmp_path / "photo.png"
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright.save(path, exif=exif)
    image = load_image(path)
    with Image.open(path) as stored:
        assert image.tobytes() == ImageOps.exif_transpose(stored).tobytes()
        assert load_image(stored).tobytes() == upright.tobytes()
    assert image.size == ((70, 40) if orientation < 5 else (40, 70))
    for family in ("llava", "llava_next"):
        assert torch.equal(mine([image], family), reference([image], family))
    utils = pytest.importorskip("transformers.image_utils")
    assert utils.load_image(str(path)).tobytes() == image.tobytes()


@pytest.mark.parametrize(
    "mode, suffix",
    [("RGBA", "png"), ("LA", "png"), ("P", "png"), ("1", "tiff"), ("CMYK", "jpg"), ("P", "gif")],
)
def test_a_file_is_the_image_that_pillow_opens(tmp_path, mode, suffix):
    path = tmp_path / f"image.{suffix}"
    noise(mode, 30, 45).save(path)
    with Image.open(path) as opened:
        for family in ("llava", "llava_next"):
            assert torch.equal(mine([load_image(path)], family), reference([opened], family))


def test_transparency_becomes_white():
    assert load_image(Image.new("RGBA", (2, 2), (10, 20, 30, 0))).getpixel((0, 0)) == (255, 255, 255)


def one_line(excinfo) -> str:
    message = str(excinfo.value)
    assert "\n" not in message
    return message


def test_images_that_are_too_thin():
    with pytest.raises(UserError, match="too thin"):
        mine([Image.new("RGB", (60_000, 1))], "llava", 336)
    with pytest.raises(UserError, match="too large to be padded"):
        mine([Image.new("RGB", (20_000, 1))], "llava", do_pad=True, image_processor_type="LlavaImageProcessor")
    # The longest edge that is read: a line for LLaVA-NeXT, whose tiles show nothing of it.
    assert mine([Image.new("RGB", (1 << 18, 1))], "llava_next").shape == (1, 3, 3, 56, 56)


@pytest.mark.parametrize(
    "family, changes, said",
    [
        ("llava", {"do_resize": False}, "do_resize"),
        ("llava", {"do_center_crop": False}, "do_center_crop"),
        ("llava", {"do_convert_rgb": False}, "do_convert_rgb"),
        ("llava", {"crop_size": 64}, "crop_size"),
        ("llava", {"crop_size": {"height": 56, "width": 70}}, "crop_size"),
        ("llava", {"size": {"shortest_edge": 40}}, "size"),
        ("llava", {"size": {"longest_edge": 56}}, "size"),
        ("llava", {"size": "56"}, "size"),
        ("llava", {"resample": 9}, "resample"),
        ("llava", {"resample": "bicubic"}, "resample"),
        ("llava", {"rescale_factor": 0}, "rescale_factor"),
        ("llava", {"image_mean": [0.5, 0.5]}, "image_mean"),
        ("llava", {"image_std": [0.5, 0.5, 0]}, "image_std"),
        ("llava", {"image_std": [1e-300] * 3}, "image_std"),
        ("llava", {"image_std": [float("nan")] * 3}, "image_std"),
        ("llava", {"image_mean": "red"}, "image_mean"),
        ("llava", {"image_mean": [1e300] * 3}, "image_mean"),
        ("llava", {"rescale_factor": float("nan")}, "rescale_factor"),
        ("llava", {"rescale_factor": float("inf")}, "rescale_factor"),
        ("llava", {"rescale_factor": 1e300}, "image_std"),
        ("llava", {"rescale_factor": None}, "rescale_factor"),
        ("llava", {"size": 10**25}, "size"),
        ("llava", {"size": {"shortest_edge": 1 << 20}}, "size"),
        ("llava", {"size": {"height": 56, "width": 1 << 27}}, "size"),
        ("llava", {"size": {"height": 56, "width": True}}, "size"),
        ("llava", {"size": [56, 56]}, "size"),
        ("llava", {"size": -56}, "size"),
        ("llava", {"resample": True}, "resample"),
        ("llava", {"resample": 1e999}, "resample"),
        ("llava", {"do_resize": "yes"}, "do_resize"),
        ("llava", {"image_processor_type": 5}, "image_processor_type"),
        ("llava_next", {"image_grid_pinpoints": 5}, "image_grid_pinpoints"),
        ("llava_next", {"image_grid_pinpoints": [[56, "x"]]}, "image_grid_pinpoints"),
        ("llava_next", {"image_grid_pinpoints": [[56]]}, "image_grid_pinpoints"),
        ("llava_next", {"size": {"shortest_edge": 64}}, "size"),
        ("llava_next", {"image_grid_pinpoints": [[56, 56]]}, "image_grid_pinpoints"),
    ],
)
def test_settings_that_are_refused(family, changes, said):
    with pytest.raises(UserError) as excinfo:
        ImageSettings.from_dict(settings_dict(**changes), config(family), "preprocessor_config.json")
    assert one_line(excinfo).startswith(f"preprocessor_config.json: {said}")


def test_pad_to_square_has_no_meaning_for_tiles():
    with pytest.raises(UserError, match="pad_to_square"):
        ImageSettings.from_dict(settings_dict(), config("llava_next"), "test", True)
