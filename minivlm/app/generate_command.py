"""Ask a LLaVA checkpoint about images. The answer is printed as it is generated.

python scripts/generate.py --image page.png --prompt "What is the total?"
python scripts/generate.py --model llava-hf/llava-1.5-7b-hf --image photo.jpg --chat
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

from minivlm.app import policy_flags
from minivlm.app.chat import converse, show
from minivlm.app.cli import Parser, note_settings
from minivlm.app.overlay import check_layer, draw_overlay
from minivlm.cache.recorder import Recorder
from minivlm.cache.settings import CacheSettings
from minivlm.errors import UserError
from minivlm.files import expect_writable, write_whole
from minivlm.generation.sampling import Sampling
from minivlm.generation.vlm import VLM
from minivlm.inputs.images import load_image


def main(arguments: Sequence[str], load: Callable[..., VLM]) -> None:
    """Run the command. `load` is `weights.load`, which this package may not import itself."""
    # Images are read before the checkpoint is loaded, so that a mistake in one is reported at once.
    args = parse(arguments)
    settings = policy_flags.from_args(args, args.seed)
    sampling = Sampling(args.max_new_tokens, args.temperature, args.top_p, args.seed)
    images = [load_image(path) for path in args.image]
    vlm = load(
        args.model,
        device=args.device,
        dtype=args.dtype,
        compile=args.compile,
        pad_to_square=args.pad_to_square,
    )
    note_settings(settings, args, images=bool(images) or args.chat)
    if args.chat:
        converse(vlm.chat(sampling=sampling, settings=settings), images, args.prompt, args.stats)
    else:
        answer_one(vlm, args, images, sampling, settings)


def answer_one(
    vlm: VLM,
    args: argparse.Namespace,
    images: Sequence[Image.Image],
    sampling: Sampling,
    settings: CacheSettings,
) -> None:
    """Print the answer to one question and draw the overlay, if one is wanted.

    After Ctrl-C, the overlay of the shorter answer is still drawn; then `KeyboardInterrupt` is
    raised.
    """
    if args.overlay_layer is not None:
        check_layer(args.overlay_layer, vlm.config.text.num_hidden_layers)
    recorder = Recorder() if args.overlay else None
    stream = vlm.stream(args.prompt, images, sampling=sampling, settings=settings, observer=recorder)
    interrupted = show(stream, args.stats)
    if recorder is not None:
        page = draw_overlay(
            images,
            vlm.config,
            recorder,
            layer_idx=args.overlay_layer,
            step=args.overlay_step,
            settings=vlm.processor.image_settings,
        )
        write_whole(args.overlay, lambda path: page.save(path, format="PNG"))
    if interrupted:
        raise KeyboardInterrupt


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command's flags. Raises `UserError` for flags that are wrong or exclude each other."""
    parser = Parser(__doc__)
    parser.model_flags()
    add_question_flags(parser)
    add_answer_flags(parser)
    add_output_flags(parser)
    policy_flags.add_arguments(parser, arguments)
    args = parser.parse_args(arguments)
    check_args(args)
    return args


def add_question_flags(parser: Parser) -> None:
    """The flags that say what is asked."""
    parser.question_flags("images, in the order in which the prompt refers to them")
    parser.switch(
        "chat",
        help="hold a conversation in one cache: --prompt first, then one question per line of "
        "standard input; the line `/image FILE` adds an image to the next question",
    )
    parser.switch(
        "pad_to_square",
        default=None,
        help="LLaVA-1.5: pad images to a square instead of cropping them (as the checkpoint says)",
    )


def add_answer_flags(parser: Parser) -> None:
    """The flags that say how the answer is made."""
    parser.flag(
        "max_new_tokens",
        type=int,
        default=256,
        metavar="N",
        help="length of the longest answer, in tokens (256)",
    )
    parser.flag(
        "temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="sampling temperature; 0 is greedy (0)",
    )
    parser.flag(
        "top_p",
        type=float,
        default=1.0,
        metavar="P",
        help="sample from the most likely tokens whose probabilities add up to P (1)",
    )
    parser.switch(
        "compile",
        help="use torch.compile: slow at first, then faster; pays for long answers",
    )
    parser.flag("no_compile", dest="compile", action="store_false", help="run eagerly (the default)")


def add_output_flags(parser: Parser) -> None:
    """The flags that ask for more than the answer."""
    parser.switch("stats", help="print times and KV bytes on standard error")
    parser.flag(
        "overlay",
        type=Path,
        metavar="OUT.png",
        help="draw on the images which patches were evicted, kept, or part of the core",
    )
    parser.flag(
        "overlay_layer",
        type=int,
        metavar="L",
        help="the layer to draw beside the mean of all layers (the middle layer)",
    )
    parser.flag(
        "overlay_step",
        type=int,
        metavar="N",
        help="the step whose core is drawn; 0 is the prefill (the last step)",
    )


def check_args(args: argparse.Namespace) -> None:
    """Raise `UserError` for flags that do not go together and for an unwritable overlay."""
    if args.prompt is None and not args.chat:
        raise UserError("expected --prompt TEXT, or --chat")
    if args.overlay and (args.chat or not args.image):
        raise UserError("--overlay draws the images of one question (expected --image, and no --chat)")
    for name in ("overlay_layer", "overlay_step"):
        if getattr(args, name) is not None and not args.overlay:
            raise UserError(f"--{name} has no effect without --overlay OUT.png")
    if args.overlay_step is not None and args.overlay_step < 0:
        raise UserError(f"--overlay_step is {args.overlay_step} (expected 0 or more)")
    if args.overlay:
        expect_writable(args.overlay)
