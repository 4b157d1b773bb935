"""Image files from outside: what is read, what deep greys become, and what is refused in one line."""

from __future__ import annotations

import io
import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps, TiffImagePlugin

from minivlm.errors import UserError
from minivlm.inputs.images import load_image, read_image


def refusal(source: object) -> str:
    with pytest.raises(UserError) as error:
        load_image(source)
    message = str(error.value)
    name = "image" if isinstance(source, Image.Image) else str(UserError(str(source)))
    assert "\n" not in message and message.startswith(f"{name}: ")
    return message


def picture(mode: str = "RGB", width: int = 40, height: int = 30) -> Image.Image:
    return Image.radial_gradient("L").resize((width, height)).convert(mode)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of_size(width: int, height: int, *chunks: bytes, data: bytes = b"\0" * 64) -> bytes:
    """A black and white PNG that promises more pixels than it holds."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


# Files that are read


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "bmp", "tiff", "ppm", "jp2", "avif"])
def test_formats_that_are_read(suffix, tmp_path):
    path = tmp_path / f"x.{suffix}"
    picture().save(path)
    image = load_image(path)
    assert (image.mode, image.size) == ("RGB", (40, 30))
    with Image.open(path) as opened:
        assert opened.convert("RGB").tobytes() == image.tobytes()
    (tmp_path / "link").symlink_to(path)
    assert load_image(str(tmp_path / "link")).tobytes() == image.tobytes()


def test_the_name_and_the_suffix_mean_nothing(tmp_path):
    path = tmp_path / os.fsdecode(b"\xff.eps")
    picture().save(path, "PNG")
    assert load_image(path).size == (40, 30)


def test_bytes_in_memory():
    file = io.BytesIO()
    picture().save(file, "PNG")
    assert read_image(file, "row 5").tobytes() == picture().tobytes()
    with pytest.raises(UserError, match="^row 5: not an image"):
        read_image(io.BytesIO(b"no"), "row 5")


def test_a_loaded_image_is_not_copied():
    image = picture()
    assert load_image(image) is image


# Grey of more than 8 bits

RAMP = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)  # 0 ... 255 as 16 bits


@pytest.mark.parametrize("suffix", ["png", "tiff", "jp2", "pgm"])
def test_sixteen_bits_become_the_eight_that_they_were(suffix, tmp_path):
    path = tmp_path / f"x.{suffix}"
    Image.fromarray(RAMP).save(path, **({"irreversible": False} if suffix == "jp2" else {}))
    assert np.asarray(load_image(path))[..., 0].tobytes() == bytes(range(256))


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I;16L", "I;16N"])
def test_sixteen_bits_are_rounded(mode):
    image = Image.new(mode, (4, 1))
    for x, value in enumerate((0, 128, 129, 65535)):
        image.putpixel((x, 0), value)
    assert np.asarray(load_image(image))[0, :, 1].tolist() == [0, 0, 1, 255]


def test_a_transparent_grey_of_sixteen_bits_is_white(tmp_path):
    Image.fromarray(RAMP).save(tmp_path / "x.png", transparency=257)
    assert np.asarray(load_image(tmp_path / "x.png"))[0, :3, 0].tolist() == [0, 255, 2]


@pytest.mark.parametrize("suffix", ["memory", "tiff", "pfm"])
@pytest.mark.parametrize(
    "values, grey",
    [
        ([0.0, 0.5, 1.0], [0, 128, 255]),
        ([0.0, 128.25, 255.0], [0, 128, 255]),
        ([0.0, 257.0, 65535.0], [0, 1, 255]),
        ([0.0, 0.0, 0.0], [0, 0, 0]),
    ],
)
def test_white_of_floats_is_the_smallest_usual_one(suffix, values, grey, tmp_path):
    image = Image.fromarray(np.array([values], np.float32))
    if suffix != "memory":
        image.save(tmp_path / f"x.{suffix}")
    source = image if suffix == "memory" else tmp_path / f"x.{suffix}"
    assert np.asarray(load_image(source))[0, :, 0].tolist() == grey


@pytest.mark.parametrize("values, grey", [([0, 100, 255], [0, 100, 255]), ([0, 256, 65535], [0, 1, 255])])
def test_white_of_integers_is_the_smallest_usual_one(values, grey, tmp_path):
    Image.fromarray(np.array([values], np.int32)).save(tmp_path / "x.tiff")
    assert np.asarray(load_image(tmp_path / "x.tiff"))[0, :, 0].tolist() == grey


@pytest.mark.parametrize("values", [[-1, 5], [0, 65536], [float("nan"), 0], [0, float("inf")]])
@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_deep_greys_without_a_white_are_refused(values, dtype, tmp_path):
    if dtype == np.int32 and not np.isfinite(values).all():
        values = [2**31 - 1, -(2**31)]
    Image.fromarray(np.array([values], dtype)).save(tmp_path / "x.tiff")
    assert "its pixels range from" in refusal(tmp_path / "x.tiff")


# Files that are refused


def text_bomb(kind: bytes) -> bytes:
    bomb = zlib.compress(b"x" * (100 << 20), 9)
    head = {b"zTXt": b"k\0\0", b"iTXt": b"k\0\1\0\0\0", b"iCCP": b"k\0\0"}[kind]
    return png_of_size(8, 8, chunk(kind, head + bomb))


BAD = {
    "text": (b"not an image at all", "not an image"),
    "empty": (b"", "not an image"),
    "EPS": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "not an image"),
    "bomb": (png_of_size(50_000, 50_000), "decompression bomb"),
    "half a bomb": (png_of_size(10_000, 10_000), "decompression bomb"),
    "a line": (png_of_size(89_000_000, 1), "an edge of 89000000 pixels (expected at most 262144)"),
    "a column": (png_of_size(1, 89_000_000), "an edge of 89000000 pixels"),
    "no pixels": (png_of_size(300, 300), "cannot be read"),
    "no width": (png_of_size(0, 8), "not an image, or damaged"),
    "text bomb": (text_bomb(b"zTXt"), "cannot be read"),
    "other text bomb": (text_bomb(b"iTXt"), "cannot be read"),
    "broken chunk": (png_of_size(8, 8)[:20] + b"\xff" * 20, "not an image, or damaged"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files(name, tmp_path):
    content, said = BAD[name]
    path = tmp_path / "x.png"
    path.write_bytes(content)
    assert said in refusal(path)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "bmp", "tiff", "ppm", "jp2", "avif"])
def test_truncated_files(suffix, tmp_path):
    path = tmp_path / f"x.{suffix}"
    Image.effect_noise((64, 64), 50).convert("RGB").save(path)
    content = path.read_bytes()
    for size in (20, len(content) // 2, len(content) * 3 // 4):
        path.write_bytes(content[:size])
        refusal(path)


def test_libtiff_is_silent(tmp_path, capfd):
    path = tmp_path / "x.tiff"
    Image.effect_noise((64, 64), 50).save(path, compression="tiff_lzw")
    content = bytearray(path.read_bytes())
    content[12:40] = b"\xff" * 28
    path.write_bytes(content)
    refusal(path)
    os.write(2, b"said afterwards")
    assert capfd.readouterr().err == "said afterwards"


def test_nonsense_beside_the_pixels(tmp_path):
    """A damaged profile or EXIF block is refused, or passed over; it never changes the pixels."""
    for i, extra in enumerate(
        (chunk(b"iCCP", b"junk"), chunk(b"eXIf", b"\xff" * 40), chunk(b"eXIf", b"MM\0*\0\0\0\x08"))
    ):
        path = tmp_path / f"{i}.png"
        path.write_bytes(png_of_size(8, 8, extra))
        try:
            assert load_image(path).tobytes() == bytes(8 * 8 * 3)
        except UserError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)


def test_several_pages(tmp_path):
    for suffix in ("gif", "tiff", "webp", "png", "avif"):
        frames = [Image.new("RGB", (9, 9), (90 * i, 0, 0)) for i in range(3)]
        path = tmp_path / f"x.{suffix}"
        frames[0].save(path, save_all=True, append_images=frames[1:])
        assert "several frames or pages" in refusal(path)


def test_the_preview_of_a_photograph_is_passed_over(tmp_path):
    path = tmp_path / "x.jpg"
    picture().save(path, "MPO", save_all=True, append_images=[picture(width=10)])
    assert load_image(path).size == (40, 30)


def test_images_in_memory_that_are_refused():
    assert "empty" in refusal(Image.new("RGB", (0, 5)))
    assert "La" in refusal(Image.new("La", (2, 2)))
    assert "an edge of 300000 pixels" in refusal(Image.new("1", (300_000, 1)))


def test_warnings_are_no_errors(tmp_path):
    """A tag that Pillow warns of does no harm to the pixels."""
    info = TiffImagePlugin.ImageFileDirectory_v2()
    info[305] = "software"
    path = tmp_path / "x.tiff"
    picture("L").save(path, tiffinfo=info)
    content = path.read_bytes()
    place = content.index(struct.pack("<HHI", 305, 2, 9))
    path.write_bytes(content[: place + 8] + struct.pack("<I", 1 << 30) + content[place + 12 :])  # beyond the end
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        image = load_image(path)
    assert caught and image.tobytes() == picture("L").convert("RGB").tobytes()


def test_a_file_of_another_kind(tmp_path):
    assert "no such file" in refusal(tmp_path / "nowhere.png")
    assert "is a folder" in refusal(tmp_path)
    os.mkfifo(tmp_path / "fifo")
    assert "is a FIFO" in refusal(tmp_path / "fifo")
    assert "null byte" in refusal(Path("a\0b"))


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_turns_nothing(orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture().save(tmp_path / "x.jpg", exif=exif)
    with Image.open(tmp_path / "x.jpg") as stored:
        assert load_image(tmp_path / "x.jpg").tobytes() == ImageOps.exif_transpose(stored).tobytes()
