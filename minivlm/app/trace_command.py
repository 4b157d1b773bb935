"""Trace a greedy answer: tokens, logits, evictions and core sets, as in tests/golden/README.md."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from minivlm.app import policy_flags
from minivlm.app.cli import Parser, note_settings
from minivlm.app.trace import expand, trace
from minivlm.errors import UserError
from minivlm.files import expect_writable, write_whole
from minivlm.generation.vlm import VLM
from minivlm.inputs.images import LONGEST_EDGE, load_image
from minivlm.tensor_files import TensorFile

_INTEGERS = ("I8", "I16", "I32", "I64", "U8", "U16", "U32", "U64")
_REALS = ("F16", "BF16", "F32", "F64")
_MAX_BYTES = 1 << 32  # of a tensor; a thousand images of five tiles


def main(arguments: Sequence[str], load: Callable[..., VLM]) -> None:
    """Run the command. `load` is `weights.load`, which this package may not import itself."""
    # Small files are read before the checkpoint is loaded, so that mistakes are reported at once.
    args = parse(arguments)
    settings = policy_flags.from_args(args, args.seed)
    images = [load_image(path) for path in args.image]
    inputs = read_inputs(args.inputs) if args.inputs else None
    forced = read_tokens(args.teacher_forcing) if args.teacher_forcing else None
    vlm = load(args.model, device=args.device, dtype=args.dtype)

    if inputs is None:
        inputs = render_inputs(vlm, args.prompt, images)
    ids = inputs["input_ids"][0].long()
    check_ids("input_ids", ids, vlm.config.text.vocab_size)
    if forced is not None:
        check_ids("teacher forcing", forced, vlm.config.text.vocab_size)
    features = image_features(vlm, inputs)
    tensors = trace(vlm, expand(vlm, ids, features), features, args.steps, settings, forced)
    note_settings(settings, args)
    # The inputs are part of the trace, so that it can be repeated with --inputs.
    for name in ("input_ids", "pixel_values", "image_sizes"):
        if name in inputs:
            tensors[name] = inputs[name]
    write_whole(args.out, lambda path: save_tensors(tensors, path))


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command's flags. Raises `UserError` for flags that are wrong or exclude each other."""
    parser = Parser(__doc__)
    parser.model_flags()
    add_flags(parser)
    policy_flags.add_arguments(parser, arguments)
    args = parser.parse_args(arguments)
    if (args.inputs is None) == (args.prompt is None) or (args.inputs and args.image):
        raise UserError("expected either --inputs, or --prompt with --image")
    if args.steps < 1:
        raise UserError(f"--steps is {args.steps} (expected at least 1)")
    expect_writable(args.out)
    return args


def add_flags(parser: Parser) -> None:
    """The command's own flags."""
    parser.flag(
        "inputs",
        type=Path,
        metavar="IN.safetensors",
        help="the model's inputs: input_ids [1, S], pixel_values, for LLaVA-NeXT image_sizes (h, w)",
    )
    parser.question_flags("images for --prompt, instead of --inputs")
    parser.flag(
        "steps",
        type=int,
        required=True,
        metavar="N",
        help="number of steps, counting the prefill; the answer's end is ignored",
    )
    parser.flag(
        "teacher_forcing",
        type=Path,
        metavar="TRACE.safetensors",
        help="feed the `tokens` of this trace instead of the model's own choices",
    )
    parser.flag(
        "out",
        type=Path,
        required=True,
        metavar="OUT.safetensors",
        help="the trace; written completely or not at all",
    )


def read_inputs(path: Path) -> dict[str, Tensor]:
    """Read input_ids [1, S] and, if there are images, pixel_values and image_sizes [I, 2].

    Raises `UserError` if one of them is malformed.
    """
    with TensorFile(path) as file:
        inputs = {"input_ids": _read(file, "input_ids", _INTEGERS, "integers [1, S]", (1, None))}
        if "pixel_values" in file.tensors:
            tiles = () if len(file.tensors["pixel_values"].shape) == 4 else (None,)
            expected = "real numbers [images, 3, s, s], or [images, tiles, 3, s, s]"
            inputs["pixel_values"] = _read(file, "pixel_values", _REALS, expected, (None, *tiles, 3, None, None))
            if not bool(inputs["pixel_values"].isfinite().all()):
                raise UserError(f"{path}: pixel_values are not all finite")
        if "image_sizes" in file.tensors:
            expected = "a height and a width in pixels for each image, [images, 2]"
            sizes = inputs["image_sizes"] = _read(file, "image_sizes", _INTEGERS, expected, (None, 2))
            _check_range(f"{path}: image_sizes", sizes, 1, LONGEST_EDGE)
    return inputs


def read_tokens(path: Path) -> Tensor:
    """Read the `tokens` [T] of a trace. Raises `UserError`."""
    with TensorFile(path) as file:
        return _read(file, "tokens", _INTEGERS, "integers [T]", (None,)).long()


def _read(file: TensorFile, name: str, dtypes: Sequence[str], expected: str, shape: Sequence[int | None]) -> Tensor:
    """A tensor that is not empty, of one of these dtypes; None in its shape stands for any size."""
    if name not in file.tensors:
        raise UserError(f"{file.path}: has no tensor {name!r}")
    stored = file.tensors[name]
    if not stored.fits(shape) or stored.dtype not in dtypes or not 0 < stored.nbytes <= _MAX_BYTES:
        raise UserError(f"{file.path}: {name} are {stored.dtype} {list(stored.shape)} (expected {expected})")
    return file.read(name)


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file. A full disk raises `OSError`, as it does for other files."""
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:
        raise OSError(str(error)) from None


def check_ids(name: str, ids: Tensor, vocab_size: int) -> None:
    """Raise `UserError` unless all ids are below `vocab_size`."""
    _check_range(f"{name}: ids", ids, 0, vocab_size - 1)


def _check_range(name: str, values: Tensor, least: int, most: int) -> None:
    # In 64 bits with a sign, the largest of those without one are negative.
    lowest, highest = int(values.long().min()), int(values.long().max())
    if lowest < least or highest > most:
        raise UserError(f"{name} {lowest} to {highest} (expected {least} to {most})")


def render_inputs(vlm: VLM, prompt: str, images: Sequence[Image.Image]) -> dict[str, Tensor]:
    """The model's inputs for a question about images, under the names that `read_inputs` reads."""
    inputs = vlm.processor([vlm.processor.question(prompt, len(images))], [images])
    tensors = {"input_ids": inputs.input_ids}
    if inputs.pixel_values is not None:
        tensors["pixel_values"] = inputs.pixel_values
        tensors["image_sizes"] = torch.tensor(inputs.image_sizes)
    return tensors


def image_features(vlm: VLM, inputs: dict[str, Tensor]) -> list[Tensor]:
    """The decoder inputs [N_i, C] of each image; none without pixel_values."""
    if "pixel_values" not in inputs:
        return []
    sizes = inputs["image_sizes"].tolist() if "image_sizes" in inputs else []
    return vlm.image_features(inputs["pixel_values"], [(height, width) for height, width in sizes])
