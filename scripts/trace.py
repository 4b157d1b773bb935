"""Trace a greedy answer: tokens, logits, evictions and core sets, in the layout of tests/golden/README.md."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import weights
from minivlm.cache import settings as cache
from minivlm.cli import Parser, note, run, write_whole
from minivlm.errors import UserError
from minivlm.images import load_image
from minivlm.trace import expand, trace


def main(arguments: Sequence[str]) -> None:
    parser = Parser(__doc__)
    parser.model_flags()
    parser.flag("inputs", type=Path, metavar="IN.safetensors", help="input_ids [1, S], pixel_values, for LLaVA-NeXT image_sizes (h, w)")
    parser.flag("image", nargs="+", type=Path, default=[], metavar="FILE", help="with --prompt, instead of --inputs")
    parser.flag("prompt", metavar="TEXT")
    parser.flag("steps", type=int, required=True, help="prefill included")
    parser.flag("teacher_forcing", type=Path, metavar="TRACE.safetensors", help="feed its `tokens` instead of the model's own")
    parser.flag("out", type=Path, required=True, metavar="OUT.safetensors")
    cache.add_arguments(parser)
    args = parser.parse_args(arguments)
    if (args.inputs is None) == (args.prompt is None):
        raise UserError("expected either --inputs, or --prompt with --image")
    if args.steps < 1:
        raise UserError(f"--steps is {args.steps} (expected at least 1)")
    settings = cache.from_args(args, args.seed)
    for line in settings.notes():
        note(line)
    vlm = weights.load(args.model, device=args.device, dtype=args.dtype)
    given = _read(args.inputs, "input_ids") if args.inputs else _prompt(vlm, args.prompt, args.image)
    pixels, ids = given.get("pixel_values"), given["input_ids"]
    if ids.ndim != 2 or len(ids) != 1 or ids.is_floating_point():
        raise UserError(f"input_ids have shape {list(ids.shape)} and dtype {ids.dtype} (expected integers [1, S])")
    if not 0 <= int(ids.min()) <= int(ids.max()) < vlm.config.text.vocab_size:
        raise UserError(f"input_ids hold ids outside the vocabulary of {vlm.config.text.vocab_size}")
    with torch.no_grad():
        features = [] if pixels is None else vlm.image_features(pixels, [tuple(size) for size in given.get("image_sizes", torch.zeros(0)).tolist()])
    forced = _read(args.teacher_forcing, "tokens")["tokens"] if args.teacher_forcing else None
    ids = expand(vlm, ids[0].long(), features)
    out = trace(vlm, ids, features, args.steps, settings, forced)
    out |= {name: given[name] for name in ("input_ids", "pixel_values", "image_sizes") if name in given}
    write_whole(args.out, lambda path: save_file({name: tensor.contiguous() for name, tensor in out.items()}, path))


def _read(path: Path, key: str) -> dict[str, torch.Tensor]:
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read as safetensors ({error})") from None
    if key not in tensors:
        raise UserError(f"{path}: has no tensor {key!r}")
    return tensors


def _prompt(vlm, prompt: str, paths: Sequence[Path]) -> dict[str, torch.Tensor]:
    images = [load_image(path) for path in paths]
    inputs = vlm.processor([vlm.processor.question(prompt, len(images))], [images])
    given = {"input_ids": inputs.input_ids}
    if images:
        given["pixel_values"] = inputs.pixel_values
        given["image_sizes"] = torch.tensor(inputs.image_sizes)
    return given


if __name__ == "__main__":
    run(main)
