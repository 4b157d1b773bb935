"""Named cases: files that are none, outputs, flags, standard output, images, tensors."""

from __future__ import annotations

import itertools
import json
import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from fuzzer import checkpoints, flags, paths, pictures
from fuzzer.case import Box, Case, Expect
from fuzzer.child import Ran
from fuzzer.registry import named
from fuzzer.world import LLAVA, NEXT, QUESTION

# Outputs: links, devices, modes


FILES = tuple(label for label in paths.OUTPUTS if label != "--output_path")


@named("output to a link", *FILES)
def _(box: Box, label: str) -> Case:
    case = paths.output_case(box, label, paths.link)
    kept = box.out / "file"

    def check(ran: Ran) -> None:
        assert kept.read_bytes() != b"old", "the link was replaced"
        case.check(ran)

    return replace(case, expect=Expect.ANSWER, check=check)


@named("output to a device", *FILES)
def _(box: Box, label: str) -> Case:
    return replace(paths.output_case(box, label, paths.null_device), expect=Expect.ANSWER)


@named("output to a FIFO that nobody reads", *paths.OUTPUTS)
def _(box: Box, label: str) -> Case:
    return replace(paths.output_case(box, label, paths.fifo), expect=Expect.REFUSAL)


@named("an output has the mode of the umask")
def _(box: Box) -> Case:
    out = box.out / "t.safetensors"
    flags_ = ["--model", box.shared / NEXT, "--prompt", QUESTION, "--steps", 2, "--out", out]

    def check(ran: Ran) -> None:
        (box.out / "other").touch()
        assert out.stat().st_mode == (box.out / "other").stat().st_mode

    return Case("trace.py", flags_, Expect.ANSWER, outputs=[box.out], check=check)


# Files that are no files


@named("in the place of", *itertools.product(paths.INPUTS, paths.WAITING))
def _(box: Box, place: tuple[str, Callable[[Path], paths.Name]]) -> Case:
    return paths.input_case(box, *place)


@named("an image that is", *paths.NO_FILES)
def _(box: Box, make: Callable[[Path], paths.Name]) -> Case:
    return paths.input_case(box, "--image", make)


# Flags


@named("--limit", "inf", "nan", "1e999", "-1", "0", "1.5", "9" * 5000)
def _(box: Box, value: str) -> Case:
    return flags.with_words(box, flags.EVAL, f"--limit={value}", expect=Expect.REFUSAL)


@named("a flag's number", "--temperature=nan", "--temperature=inf", "--top_p=nan", "--kv_budget=nan", "--kv_budget=inf")
def _(box: Box, flag: str) -> Case:
    return flags.with_words(box, flags.GENERATE, flag, expect=Expect.REFUSAL)


# The rest


@named("stdout is full")
def _(box: Box) -> Case:
    device = box.root / "in" / "full"
    paths.device(device, 7)
    return Case("generate.py", checkpoints.ask(box, box.shared / NEXT), stdout=device)


@named("stdout takes only ASCII", "generate.py", "eval")
def _(box: Box, command: str) -> Case:
    if command == "eval":
        return replace(flags.with_words(box, flags.EVAL, expect=Expect.ANSWER), stdout="ascii", check=None)
    return Case("generate.py", checkpoints.ask(box, box.shared / NEXT), Expect.ANSWER, stdout="ascii")


@named("an overlay of step", str(10**25), "9" * 5000)
def _(box: Box, step: str) -> Case:
    return flags.with_words(box, flags.OVERLAY, "--overlay_step", step)


@named("benchmark --policy", '"', "'", "a: '", "", ": ", "full --kv_budget", "full --policy avl", "\\")
def _(box: Box, policy: str) -> Case:
    return flags.with_words(box, flags.BENCHMARK, "--policy", policy)


@named("benchmark", f"--batch={10**25}", f"--vision_tokens={10**12}", f"--new_tokens={10**25}", f"--seed={10**25}")
def _(box: Box, flag: str) -> Case:
    return flags.with_words(box, flags.BENCHMARK, flag, expect=Expect.REFUSAL)


@named("attention_stats.py", "--top=nan", "--top=inf", "--top=-1", f"--distances={10**25}", "--max_new_tokens=0")
def _(box: Box, flag: str) -> Case:
    return flags.with_words(box, flags.ATTENTION, flag)


@named("a PNG of 1 x 89,000,000 pixels", NEXT, LLAVA)
def _(box: Box, model: str) -> Case:
    header = struct.pack(">IIBBBBB", 1, 89_000_000, 8, 0, 0, 0, 0)
    packed = zlib.compress(bytes(2 * 89_000_000), 1)
    content = pictures.png_of([(b"IHDR", header), (b"IDAT", packed), (b"IEND", b"")])
    return pictures.image_case(box, "thin.png", content, model, compares=False)


@named("grey in", "16 bits, PNG", "16 bits, TIFF", "32 bits, TIFF", "floats, TIFF")
def _(box: Box, kind: str) -> Case:
    """More bits say the same as eight."""
    grey = Image.linear_gradient("L").resize((64, 48))
    grey.save(box.inputs / "grey.png")
    values = torch.tensor(list(grey.getdata())).view(48, 64)
    array = {"16": (values * 257).to(torch.uint16), "32": (values * 257).int(), "fl": (values / 255).float()}[kind[:2]]
    path = box.inputs / f"more.{kind[-4:].strip().lower()}"
    Image.fromarray(array.numpy()).save(path)

    def check(ran: Ran) -> None:
        expected = box.clean("generate.py", *_about(box, box.inputs / "grey.png")).out
        assert ran.out == expected, f"another answer: {ran.out!r} instead of {expected!r}"

    return Case("generate.py", _about(box, path), Expect.ANSWER, check=check)


def _about(box: Box, image: Path) -> tuple[object, ...]:
    return ("--model", box.shared / NEXT, "--image", image, "--prompt", QUESTION, "--max_new_tokens", 8)


INPUTS = (
    *("complex pixel_values", "pixel_values of nan", "ids of bool", "ids below zero", "no image_sizes"),
    "image_sizes of 2**40",
)


@named("inputs", *INPUTS)
def _(box: Box, kind: str) -> Case:
    tensors = load_file(box.shared / "inputs.safetensors")
    pixels, ids = tensors["pixel_values"], tensors["input_ids"]
    tensors |= {
        "complex pixel_values": {"pixel_values": pixels.to(torch.complex64)},
        "pixel_values of nan": {"pixel_values": pixels * float("nan")},
        "ids of bool": {"input_ids": ids > 5},
        "ids below zero": {"input_ids": -ids},
        "image_sizes of 2**40": {"image_sizes": torch.tensor([[2**40, 1]])},
    }.get(kind, {})
    if kind == "no image_sizes":
        del tensors["image_sizes"]
    save_file(tensors, box.inputs / "i.safetensors")
    flags_ = ["--model", box.shared / NEXT, "--inputs", box.inputs / "i.safetensors", "--steps", 2]
    return Case("trace.py", [*flags_, "--out", box.out / "t.safetensors"], Expect.REFUSAL)


@named("a TIFF of which Pillow warns")
def _(box: Box) -> Case:
    content = bytearray((box.shared / "page.tiff").read_bytes())
    (directory,) = struct.unpack_from("<I", content, 4)
    struct.pack_into("<I", content, directory + 2 + 4, 3073)  # the first entry holds so many values
    return pictures.image_case(box, "page.tiff", bytes(content), NEXT, compares=False)


@named("a saved cache with a changed number in", "k", "v", "score", "position", "vision_attn")
def _(box: Box, name: str) -> Case:
    content = (box.shared / "cache.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    begin, end = json.loads(content[8 : 8 + length])[f"layers.0.{name}"]["data_offsets"]
    place = 8 + length + (begin + end) // 2
    changed = bytearray(content)
    changed[place] ^= 1
    path = box.write("cache.safetensors", bytes(changed))
    return Case("load_cache", [box.shared / NEXT, path], Expect.REFUSAL)
