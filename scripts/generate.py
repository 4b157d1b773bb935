"""Ask a LLaVA checkpoint about images; the answer is streamed.

python scripts/generate.py --image page.png --prompt "What is the total?"
python scripts/generate.py --model llava-hf/llava-1.5-7b-hf --image photo.jpg --chat
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import weights
from minivlm.app import policy_flags
from minivlm.app.chat import converse, show
from minivlm.app.cli import Parser, note_settings, run
from minivlm.app.overlay import draw
from minivlm.cache.recorder import Recorder
from minivlm.errors import UserError
from minivlm.files import expect_writable, write_whole
from minivlm.generation.generate import Sampling
from minivlm.inputs.images import load_image


def main(arguments: Sequence[str]) -> None:
    args = parse(arguments)
    settings = policy_flags.from_args(args, args.seed)
    sampling = Sampling(args.max_new_tokens, args.temperature, args.top_p, args.seed)
    images = [load_image(path) for path in args.image]
    vlm = weights.load(
        args.model, device=args.device, dtype=args.dtype, compile=args.compile, pad_to_square=args.pad_to_square
    )
    note_settings(settings, args, images=bool(images) or args.chat)
    if args.chat:
        converse(vlm.chat(sampling=sampling, settings=settings), images, args.prompt, args.stats)
        return
    layers = vlm.config.text.num_hidden_layers
    if args.overlay_layer is not None and not 0 <= args.overlay_layer < layers:
        raise UserError(f"--overlay_layer is {args.overlay_layer}, the model has layers 0 to {layers - 1}")
    recorder = Recorder() if args.overlay else None
    stream = vlm.stream(args.prompt, images, sampling=sampling, settings=settings, observer=recorder)
    interrupted = show(stream, args.stats)
    if args.overlay:
        if settings.vision_interval <= 1:
            recorder.cores.clear()  # chosen, as the paper has it, but no step leaves the others out
        vision = stream.generation.cache.tracks[0].vision
        page = draw(
            images,
            vlm.config,
            recorder,
            vision,
            layers,
            args.overlay_layer,
            args.overlay_step,
            vlm.processor.image_settings,
        )
        write_whole(args.overlay, lambda path: page.save(path, format="PNG"))
    if interrupted:
        raise KeyboardInterrupt


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.model_flags()
    parser.flag(
        "image",
        nargs="+",
        action="extend",
        type=Path,
        default=[],
        metavar="FILE",
        help="in the order in which the prompt speaks of them",
    )
    parser.flag("prompt", metavar="TEXT", help="the question; <image> in it says where an image stands")
    parser.flag(
        "chat",
        type=policy_flags.parse_bool,
        nargs="?",
        const=True,
        default=False,
        metavar="BOOL",
        help="converse in one cache: a question a line from standard input, --prompt first; /image FILE adds an image to the next one",
    )
    parser.flag("max_new_tokens", type=int, default=256, metavar="N", help="of one answer (256)")
    parser.flag("temperature", type=float, default=0.0, metavar="T", help="0 is greedy (0)")
    parser.flag(
        "top_p",
        type=float,
        default=1.0,
        metavar="P",
        help="sample from the most likely tokens that make up this share (1)",
    )
    parser.flag(
        "compile",
        type=policy_flags.parse_bool,
        nargs="?",
        const=True,
        default=False,
        metavar="BOOL",
        help="torch.compile the model: pays for long answers",
    )
    parser.flag("no_compile", dest="compile", action="store_false", help="run eagerly (the default)")
    parser.flag(
        "pad_to_square",
        type=policy_flags.parse_bool,
        nargs="?",
        const=True,
        metavar="BOOL",
        help="LLaVA-1.5: pad images instead of cropping them (as the checkpoint says)",
    )
    parser.flag(
        "stats",
        type=policy_flags.parse_bool,
        nargs="?",
        const=True,
        default=False,
        metavar="BOOL",
        help="times and KV bytes, on standard error",
    )
    parser.flag("overlay", type=Path, metavar="OUT.png", help="draw which patches were evicted, kept, or the core")
    parser.flag(
        "overlay_layer", type=int, metavar="L", help="the layer drawn beside the mean over layers (the middle one)"
    )
    parser.flag("overlay_step", type=int, metavar="N", help="the step whose core is drawn, 0 is the prefill (the last)")
    policy_flags.add_arguments(parser)
    args = parser.parse_args(arguments)
    if args.prompt is None and not args.chat:
        raise UserError("expected --prompt TEXT, or --chat")
    if args.overlay and (args.chat or not args.image):
        raise UserError("--overlay draws the images of one question (expected --image, and no --chat)")
    for name in ("overlay_layer", "overlay_step"):
        if getattr(args, name) is not None and not args.overlay:
            raise UserError(f"--{name} is for --overlay OUT.png, which is not given")
    if args.overlay_step is not None and args.overlay_step < 0:
        raise UserError(f"--overlay_step is {args.overlay_step} (expected 0 or more)")
    if args.overlay:
        expect_writable(args.overlay)
    return args


if __name__ == "__main__":
    run(main)
