"""Images: damaged files, odd modes and sizes, lies in headers, wrong names."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from random import Random

from PIL import Image, ImageOps

from fuzzer.case import Box, Case, Expect
from fuzzer.checkpoints import some_answer
from fuzzer.child import Ran
from fuzzer.mutate_json import flip_bytes
from fuzzer.world import LLAVA, NEXT, QUESTION

_FORMATS = ("wide.png", "page.jpg", "page.tiff", "page.gif", "page.webp", "page.bmp", "page.ppm")
_SIZES = (0, 1, 2, 65535, 65536, 89_478_486, 2**31 - 1, 2**31, 2**32 - 1)
_COMPARED = ("RGB", "L", "1")  # modes that keep all of their pixels as an RGB PNG


def make_image(box: Box) -> Case:
    """`generate.py` on one odd or damaged image."""
    make = box.rng.choice((damaged, damaged, damaged, lying_png, lying_fields, odd_mode, odd_shape, frames, odd_exif))
    name, content = make(box.rng, box.shared)
    if box.rng.random() < 0.2:
        name = box.rng.choice(("page", "page.png", "page.jpg", "page.txt", "page.pdf", "page.eps", ".png"))
    return image_case(box, name, content, box.rng.choice((NEXT, NEXT, LLAVA)), compares=box.rng.random() < 0.5)


def image_case(
    box: Box, name: str, content: bytes, model: str, expect: Expect = Expect.EITHER, compares: bool = True
) -> Case:
    """A question about the image `content`; with `compares`, saved anew it has to get the same answer."""
    path = box.write(name, content)

    def check(ran: Ran) -> None:
        some_answer(ran)
        if compares and (anew := _saved_anew(path, box.inputs / "anew.png")) is not None:
            assert ran.out == box.clean("generate.py", *_ask(box, model, anew)).out, "another answer when saved anew"

    return Case("generate.py", _ask(box, model, path), expect, check=check)


def _ask(box: Box, model: str, image: Path) -> tuple[object, ...]:
    return ("--model", box.shared / model, "--image", image, "--prompt", QUESTION, "--max_new_tokens", 3)


def _saved_anew(path: Path, target: Path) -> Path | None:
    """The image as Pillow reads it, upright, in a PNG; None if its mode does not keep its pixels there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(path) as image:
            if image.mode not in _COMPARED or image.info.get("transparency") is not None:
                return None
            ImageOps.exif_transpose(image).convert("RGB").save(target)
    return target


# Makers of images: each returns a file's name and content.

Made = tuple[str, bytes]


def damaged(rng: Random, shared: Path) -> Made:
    """A good file with flipped, lost, repeated or foreign bytes."""
    name = rng.choice(_FORMATS)
    content = (shared / name).read_bytes()
    change: Callable[[], bytes] = rng.choice(
        (
            lambda: flip_bytes(content, rng),
            lambda: flip_bytes(content[:64], rng) + content[64:],  # the header
            lambda: content[: rng.choice((0, 1, 8, 30, len(content) // 2, len(content) - 3))],
            lambda: content + rng.choice((b"\x00" * 1000, content)),
            lambda: (shared / rng.choice(_FORMATS)).read_bytes()[:40] + content[40:],
            lambda: rng.randbytes(rng.choice((1, 100, 5000))),
        )
    )
    return name, change()


def lying_png(rng: Random, shared: Path) -> Made:
    """A PNG whose chunks have right checksums but wrong sizes, kinds, order or content."""
    chunks = _chunks((shared / "wide.png").read_bytes())
    kind = rng.randrange(5)
    if kind == 0:
        width, height = rng.choice(_SIZES), rng.choice((1, 70, *_SIZES))
        chunks[0] = (b"IHDR", struct.pack(">II", width, height) + chunks[0][1][8:])
    elif kind == 1:
        depth, colours, interlaced = (
            rng.choice((0, 1, 4, 8, 16, 255)),
            rng.choice((0, 2, 3, 4, 6, 9)),
            rng.choice((0, 1, 7)),
        )
        chunks[0] = (b"IHDR", chunks[0][1][:8] + bytes([depth, colours, 0, 0, interlaced]))
    elif kind == 2:
        name = rng.choice((b"PLTE", b"tRNS", b"iCCP", b"tEXt", b"zTXt", b"iTXt", b"pHYs", b"acTL", b"eXIf", b"gAMA"))
        body = rng.choice((b"", b"\x00" * 5, rng.randbytes(40), b"x\x00\x00" + zlib.compress(bytes(80_000_000), 1)))
        chunks.insert(1, (name, body))
    elif kind == 3:
        rng.shuffle(chunks)
    else:
        chunks = [(name, zlib.compress(rng.randbytes(50)) if name == b"IDAT" else body) for name, body in chunks]
    return "page.png", png_of(chunks)


def _chunks(png: bytes) -> list[tuple[bytes, bytes]]:
    chunks, place = [], 8
    while place < len(png):
        (length,) = struct.unpack(">I", png[place : place + 4])
        chunks.append((png[place + 4 : place + 8], png[place + 8 : place + 8 + length]))
        place += 12 + length
    return chunks


def png_of(chunks: list[tuple[bytes, bytes]]) -> bytes:
    """A PNG of chunks, with their lengths and checksums."""
    number = struct.Struct(">I")
    parts = [number.pack(len(body)) + name + body + number.pack(zlib.crc32(name + body)) for name, body in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def lying_fields(rng: Random, shared: Path) -> Made:
    """A file in which one field of 16 or 32 bits near the beginning has an extreme value."""
    name = rng.choice(_FORMATS)
    content = bytearray((shared / name).read_bytes())
    place = rng.randrange(min(120, len(content) - 4))
    order, width = rng.choice("<>"), rng.choice("HI")
    struct.pack_into(f"{order}{width}", content, place, rng.choice(_SIZES) & (0xFFFF if width == "H" else 0xFFFFFFFF))
    return name, bytes(content)


def odd_mode(rng: Random, shared: Path) -> Made:
    """A mode that is not RGB, in a format that has it."""
    mode, suffix = rng.choice(
        [(mode, "png") for mode in ("1", "L", "LA", "P", "RGBA", "I;16")]
        + [(mode, "tiff") for mode in ("1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "LAB", "I;16", "I;16B", "I", "F")]
        + [("CMYK", "jpg"), ("L", "jpg"), ("LA", "webp"), ("RGBA", "webp"), ("P", "gif"), ("F", "pfm"), ("RGBA", "tga")]
    )
    values = Image.linear_gradient("L").resize((64, 48))
    try:
        image = values.convert(mode)
    except ValueError:
        image = values.convert("RGB").convert(mode)
    if mode in ("I", "I;16", "I;16B", "F"):
        image = image.point(lambda v: v * rng.choice((1, 257))) if mode in ("I", "F") else image
    return f"page.{suffix}", saved(image, {"jpg": "JPEG", "pfm": "PPM"}.get(suffix, suffix.upper()))


def odd_shape(rng: Random, shared: Path) -> Made:
    """One pixel, or lines of one pixel, in some format."""
    size = rng.choice(((1, 1), (1, 70), (90, 1), (2, 2), (1, 3000), (3000, 1), (1, 20_000), (700, 3)))
    suffix = rng.choice(("PNG", "JPEG", "TIFF", "GIF", "WEBP", "BMP"))
    if max(size) > 16_000 and suffix == "WEBP":
        suffix = "PNG"
    return f"page.{suffix.lower()}", saved(Image.new("RGB", size, (200, 30, 90)), suffix)


def frames(rng: Random, shared: Path) -> Made:
    """An image of several frames or pages."""
    suffix = rng.choice(("GIF", "TIFF", "WEBP", "PNG"))
    pages = [Image.new("RGB", (40, 30), (60 * i, 9, 9)) for i in range(rng.choice((2, 3, 50)))]
    return f"page.{suffix.lower()}", saved(pages[0], suffix, save_all=True, append_images=pages[1:])


def odd_exif(rng: Random, shared: Path) -> Made:
    """Orientations, sensible and not, and EXIF data that are none."""
    image = Image.open(shared / "wide.png")
    exif = image.getexif()
    exif[0x0112] = rng.choice((0, 1, 3, 6, 8, 9, 255, 65535))
    raw = exif.tobytes()
    content = rng.choice((raw, flip_bytes(raw, rng), raw[: len(raw) // 2], b"Exif\x00\x00" + rng.randbytes(30), b""))
    suffix = rng.choice(("JPEG", "PNG", "WEBP"))
    return f"page.{suffix.lower()}", saved(image, suffix, exif=content)


def saved(image: Image.Image, file_format: str, **options: object) -> bytes:
    """The bytes of an image file."""
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()
