"""What attention looks at: concordance between layers and steps, decay of text attention, shares of mass.

    python scripts/attention_stats.py --json stats.json --plot stats.png
    python scripts/attention_stats.py --model DIR --image a.png b.png --prompt "What is the total?" --json stats.json

Without --image the pages are the demo's held-out ones, each with its own question.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from tqdm import tqdm

import weights
from eval.accuracy.tasks.demo import DEMO
from eval.attention_stats import draw, statistics, watch
from minivlm.app.cli import Parser, run
from minivlm.errors import UserError
from minivlm.files import write_whole
from minivlm.inputs.images import load_image


def main(arguments: Sequence[str]) -> None:
    parser = Parser(__doc__)
    parser.model_flags()
    parser.flag("image", nargs="+", type=Path, default=[], metavar="FILE", help="pages, each asked --prompt by itself")
    parser.flag("prompt", metavar="TEXT")
    parser.flag(
        "pages", type=int, default=20, metavar="N", help="without --image: held-out pages, drawn by --seed (20)"
    )
    parser.flag(
        "max_new_tokens",
        type=int,
        default=DEMO.max_new_tokens,
        metavar="N",
        help=f"of one answer ({DEMO.max_new_tokens})",
    )
    parser.flag(
        "top",
        nargs="+",
        type=float,
        default=[0.1, 0.3, 0.5],
        metavar="P",
        help="shares of vision tokens to compare (0.1 0.3 0.5)",
    )
    parser.flag("distances", type=int, default=16, metavar="K", help="compare steps up to K apart (16)")
    parser.flag("json", type=Path, required=True, metavar="OUT.json")
    parser.flag("plot", type=Path, metavar="OUT.png", help="needs matplotlib")
    args = parser.parse_args(arguments)
    for name in ("pages", "distances"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} is {getattr(args, name)} (expected at least 1)")
    if bool(args.image) != (args.prompt is not None):
        raise UserError("expected both --image and --prompt, or neither for the demo's pages")
    if args.plot and find_spec("matplotlib") is None:
        raise UserError("--plot needs matplotlib (pip install 'minivlm[plots]')")
    images = [load_image(path) for path in args.image]
    questions = [args.prompt] * len(images)
    if not images:
        dataset = DEMO.open(None, args.seed, args.pages)
        images = [dataset.image(sample.index) for sample in dataset.samples]
        questions = [DEMO.prompt(sample) for sample in dataset.samples]
    vlm = weights.load(args.model, device=args.device, dtype=args.dtype)
    pages = tqdm(zip(questions, images), total=len(images), unit="page", disable=None)
    stats = statistics(
        (watch(vlm, question, image, args.max_new_tokens) for question, image in pages), args.top, args.distances
    )
    write_whole(args.json, lambda path: path.write_text(json.dumps(stats, indent=1) + "\n"))
    if args.plot:
        write_whole(args.plot, lambda path: draw(stats, path))
    print("\n".join(summary(stats)))


def summary(stats: dict) -> list[str]:
    """The means, a line each."""
    lines = [f"{stats['pages']} pages, {sum(stats['steps'])} steps, {stats['layers']} layers"]
    for each in stats["concordance"]:
        near = each["between_steps_mean"][0]
        near = "no answer of two steps" if near is None else f"{near:.3f} between neighbouring steps"
        layers = each["between_layers_mean"]
        layers = "a single layer" if layers is None else f"{layers:.3f} between layers"
        lines.append(f"concordance of the top {each['share']:.0%} (by chance {each['share']:.3f}): {layers}, {near}")
    mass = ", ".join(f"{name} {sum(of['by_layer']) / len(of['by_layer']):.3f}" for name, of in stats["mass"].items())
    return [*lines, f"share of attention: {mass}"]


if __name__ == "__main__":
    run(main)
