"""Trace a greedy answer: tokens, logits, evictions and core sets, as in tests/golden/README.md."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from minivlm.app import policy_flags
from minivlm.app.cli import Parser, note_settings
from minivlm.app.trace import expand, trace
from minivlm.errors import UserError
from minivlm.files import expect_writable, write_whole
from minivlm.generation.vlm import VLM
from minivlm.inputs.images import load_image


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
    inputs = read_tensors(path, "input_ids")
    ids = inputs["input_ids"]
    if ids.ndim != 2 or len(ids) != 1 or ids.shape[1] == 0 or not is_integer(ids):
        raise UserError(
            f"{path}: input_ids have shape {list(ids.shape)} and dtype {ids.dtype} (expected integers [1, S])"
        )
    pixels = inputs.get("pixel_values")
    if pixels is not None and pixels.numel() == 0:
        raise UserError(f"{path}: pixel_values hold no image (expected at least one, or no pixel_values)")
    sizes = inputs.get("image_sizes")
    if sizes is not None:
        are_pairs = sizes.ndim == 2 and sizes.shape[1] == 2
        if not are_pairs or not is_integer(sizes) or bool((sizes < 1).any()):
            raise UserError(
                f"{path}: image_sizes are {sizes.tolist()} (expected a height and a width in pixels for each image)"
            )
    return inputs


def read_tokens(path: Path) -> Tensor:
    """Read the `tokens` [T] of a trace. Raises `UserError`."""
    tokens = read_tensors(path, "tokens")["tokens"]
    if tokens.ndim != 1 or len(tokens) == 0 or not is_integer(tokens):
        raise UserError(
            f"{path}: tokens have shape {list(tokens.shape)} and dtype {tokens.dtype} (expected integers [T])"
        )
    return tokens.long()


def read_tensors(path: Path, key: str) -> dict[str, Tensor]:
    """Read a safetensors file that must contain a tensor `key`. Raises `UserError`."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read as safetensors ({error})") from None
    if key not in tensors:
        raise UserError(f"{path}: has no tensor {key!r}")
    return tensors


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file. A full disk raises `OSError`, as it does for other files."""
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:
        raise OSError(str(error)) from None


def is_integer(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


def check_ids(name: str, ids: Tensor, vocab_size: int) -> None:
    """Raise `UserError` unless all ids are below `vocab_size`."""
    lowest = int(ids.min())
    highest = int(ids.max())
    if lowest < 0 or highest >= vocab_size:
        raise UserError(f"{name}: ids {lowest} to {highest} (expected 0 to {vocab_size - 1})")


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
