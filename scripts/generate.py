"""Ask a LLaVA checkpoint about images; the answer is streamed.

    python scripts/generate.py --image page.png --prompt "What is the total?"
    python scripts/generate.py --model llava-hf/llava-1.5-7b-hf --image photo.jpg --chat
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import weights
from minivlm.cache import settings as cache
from minivlm.cache.record import Recorder
from minivlm.cache.settings import CacheSettings, parse_bool
from minivlm.cli import Parser, note, run, write_whole
from minivlm.errors import UserError
from minivlm.generate import Sampling
from minivlm.images import load_image
from minivlm.overlay import draw
from minivlm.report import describe
from minivlm.vlm import VLM, Stream


def main(arguments: Sequence[str]) -> None:
    args = parse(arguments)
    settings = cache.from_args(args, args.seed)
    sampling = Sampling(args.max_new_tokens, args.temperature, args.top_p, args.seed)
    for line in settings.notes() if args.policy_given else ():
        note(line)
    images = [load_image(path) for path in args.image]
    vlm = weights.load(args.model, device=args.device, dtype=args.dtype)
    if args.chat:
        chat(vlm, images, args.prompt, sampling, settings, args.stats)
        return
    recorder = Recorder() if args.overlay else None
    stream = vlm.stream(args.prompt, images, sampling=sampling, settings=settings, observer=recorder)
    show(stream, args.stats)
    if args.overlay:
        track = stream.generation.cache.tracks[0]
        picture = draw(images, vlm.config, recorder, track.vision, vlm.config.text.num_hidden_layers, args.overlay_layer)
        write_whole(args.overlay, lambda path: picture.save(path, format="PNG"))


def parse(arguments: Sequence[str]):
    parser = Parser(__doc__)
    parser.model_flags()
    parser.flag("image", nargs="+", type=Path, default=[], metavar="FILE", help="in the order in which the prompt speaks of them")
    parser.flag("prompt", metavar="TEXT", help="the question; <image> in it says where an image stands")
    parser.flag("chat", type=parse_bool, nargs="?", const=True, default=False, metavar="BOOL", help="converse: questions from standard input, one a line, in one cache")
    parser.flag("max_new_tokens", type=int, default=256, metavar="N", help="of one answer (256)")
    parser.flag("temperature", type=float, default=0.0, metavar="T", help="0 is greedy (0)")
    parser.flag("top_p", type=float, default=1.0, metavar="P", help="sample from the most likely tokens that make up this share (1)")
    parser.flag("stats", type=parse_bool, nargs="?", const=True, default=False, metavar="BOOL", help="times and KV bytes, on standard error")
    parser.flag("overlay", type=Path, metavar="OUT.png", help="draw which patches were evicted, kept, or the core")
    parser.flag("overlay_layer", type=int, metavar="L", help="the layer drawn beside the mean over layers (the middle one)")
    cache.add_arguments(parser)
    args = parser.parse_args(arguments)
    args.policy_given = hasattr(args, "policy") or any(name.startswith("cache.") for name in vars(args))
    if args.prompt is None and not args.chat:
        raise UserError("expected --prompt TEXT, or --chat")
    if args.overlay and (args.chat or not args.image):
        raise UserError("--overlay draws the images of one question (expected --image, and no --chat)")
    return args


def chat(vlm: VLM, images: list, first: str | None, sampling: Sampling, settings: CacheSettings, stats: bool) -> None:
    """A conversation; it ends with the input, with Ctrl-C at the prompt, or when the context is full."""
    conversation = vlm.chat(sampling=sampling, settings=settings)
    while True:
        try:
            prompt = first if first is not None else input("> " if sys.stdin.isatty() else "")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        first = None
        if not prompt.strip():
            continue
        show(conversation.ask(prompt, images), stats)
        images = []


def show(stream: Stream, stats: bool) -> None:
    """Print an answer as it comes; Ctrl-C ends the answer, not the program."""
    try:
        for piece in stream:
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        pass
    print()
    if stats:
        print(describe(stream.answer.stats), file=sys.stderr)


if __name__ == "__main__":
    run(main)
