"""Trace a greedy answer: tokens, logits, evictions and core sets, in the layout of tests/golden/README.md."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

import weights
from minivlm.app import policy_flags
from minivlm.app.cli import Parser, note_settings, run
from minivlm.app.trace import expand, trace
from minivlm.errors import UserError
from minivlm.files import expect_writable, write_whole
from minivlm.generation.vlm import VLM
from minivlm.inputs.images import load_image


def main(arguments: Sequence[str]) -> None:
    args = parse(arguments)
    settings = policy_flags.from_args(args, args.seed)
    images = [load_image(path) for path in args.image]
    given = read_inputs(args.inputs) if args.inputs else None
    forced = read_tokens(args.teacher_forcing) if args.teacher_forcing else None
    vlm = weights.load(args.model, device=args.device, dtype=args.dtype)
    if given is None:
        given = rendered(vlm, args.prompt, images)
    ids, pixels, sizes = given["input_ids"][0].long(), given.get("pixel_values"), given.get("image_sizes")
    for name, found in ("input_ids", ids), ("teacher forcing", forced):
        if found is not None and not 0 <= int(found.min()) <= int(found.max()) < vlm.config.text.vocab_size:
            raise UserError(
                f"{name}: ids {int(found.min())} to {int(found.max())} (expected 0 to {vlm.config.text.vocab_size - 1})"
            )
    features = []
    if pixels is not None:
        features = vlm.image_features(pixels, [] if sizes is None else [tuple(size) for size in sizes.tolist()])
    out = trace(vlm, expand(vlm, ids, features), features, args.steps, settings, forced)
    note_settings(settings, args)
    out |= {name: given[name] for name in ("input_ids", "pixel_values", "image_sizes") if name in given}
    write_whole(args.out, lambda path: save(out, path))


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.model_flags()
    parser.flag(
        "inputs",
        type=Path,
        metavar="IN.safetensors",
        help="input_ids [1, S], pixel_values, for LLaVA-NeXT image_sizes (h, w)",
    )
    parser.flag(
        "image",
        nargs="+",
        action="extend",
        type=Path,
        default=[],
        metavar="FILE",
        help="with --prompt, instead of --inputs",
    )
    parser.flag("prompt", metavar="TEXT", help="the question; <image> in it says where an image stands")
    parser.flag(
        "steps", type=int, required=True, metavar="N", help="prefill included; the end of the answer is ignored"
    )
    parser.flag(
        "teacher_forcing", type=Path, metavar="TRACE.safetensors", help="feed its `tokens` instead of the model's own"
    )
    parser.flag("out", type=Path, required=True, metavar="OUT.safetensors", help="written whole or not at all")
    policy_flags.add_arguments(parser)
    args = parser.parse_args(arguments)
    if (args.inputs is None) == (args.prompt is None) or (args.inputs and args.image):
        raise UserError("expected either --inputs, or --prompt with --image")
    if args.steps < 1:
        raise UserError(f"--steps is {args.steps} (expected at least 1)")
    expect_writable(args.out)
    return args


def read_inputs(path: Path) -> dict[str, Tensor]:
    """input_ids [1, S] and, where there are images, pixel_values and image_sizes [I, 2]; raises `UserError`."""
    given = read(path, "input_ids")
    ids, pixels, sizes = given["input_ids"], given.get("pixel_values"), given.get("image_sizes")
    if ids.ndim != 2 or len(ids) != 1 or ids.shape[1] == 0 or not is_integer(ids):
        raise UserError(
            f"{path}: input_ids have shape {list(ids.shape)} and dtype {ids.dtype} (expected integers [1, S])"
        )
    if pixels is not None and pixels.numel() == 0:
        raise UserError(f"{path}: pixel_values hold no image (expected at least one, or no pixel_values)")
    if sizes is not None and (
        sizes.ndim != 2 or sizes.shape[1] != 2 or not is_integer(sizes) or bool((sizes < 1).any())
    ):
        raise UserError(
            f"{path}: image_sizes are {sizes.tolist()} (expected a height and a width in pixels for each image)"
        )
    return given


def read_tokens(path: Path) -> Tensor:
    """The `tokens` [T] of a trace; raises `UserError`."""
    tokens = read(path, "tokens")["tokens"]
    if tokens.ndim != 1 or len(tokens) == 0 or not is_integer(tokens):
        raise UserError(
            f"{path}: tokens have shape {list(tokens.shape)} and dtype {tokens.dtype} (expected integers [T])"
        )
    return tokens.long()


def read(path: Path, key: str) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read as safetensors ({error})") from None
    if key not in tensors:
        raise UserError(f"{path}: has no tensor {key!r}")
    return tensors


def save(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:
        raise OSError(str(error)) from None


def is_integer(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


def rendered(vlm: VLM, prompt: str, images: Sequence) -> dict[str, Tensor]:
    """What a question about images makes of the model's inputs."""
    inputs = vlm.processor([vlm.processor.question(prompt, len(images))], [images])
    given = {"input_ids": inputs.input_ids}
    if images:
        given |= {"pixel_values": inputs.pixel_values, "image_sizes": torch.tensor(inputs.image_sizes)}
    return given


if __name__ == "__main__":
    run(main)
