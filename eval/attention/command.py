"""What attention looks at: concordance of layers and steps, decay over text, shares of mass.

    python scripts/attention_stats.py --json stats.json --plot stats.png
    python scripts/attention_stats.py --model DIR --image a.png b.png --prompt "What is the total?" --json stats.json

Without --image, the pages are held-out pages of the demo, each with its own question.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

import weights
from eval.accuracy.tasks.demo import DEMO
from eval.attention.plot import draw_statistics
from eval.attention.statistics import mean_statistics
from eval.attention.watch import watch_answer
from eval.json_files import write_json
from minivlm.app.cli import Parser
from minivlm.errors import UserError
from minivlm.files import expect_writable, write_whole
from minivlm.inputs.images import load_image

_MOST = 1 << 16  # pages, tokens, and steps between two that are compared


def measure_attention(arguments: Sequence[str]) -> None:
    """Answer questions about pages, and write what attention looked at meanwhile."""
    args = _parser().parse_args(arguments)
    for name in ("pages", "distances", "max_new_tokens"):
        if not 1 <= getattr(args, name) <= _MOST:
            raise UserError(f"--{name} is {getattr(args, name)} (expected 1 to {_MOST})")
    if not all(0 < share <= 1 for share in args.top):
        raise UserError("--top has shares outside of the range above 0, up to 1")
    if bool(args.image) != (args.prompt is not None):
        raise UserError("expected both --image and --prompt, or neither for the demo's pages")
    if args.plot and find_spec("matplotlib") is None:
        raise UserError("--plot needs matplotlib (pip install 'minivlm[plots]')")
    for path in filter(None, (args.json, args.plot)):
        expect_writable(path)
    questions = _questions(args)
    vlm = weights.load(args.model, device=args.device, dtype=args.dtype)
    progress = tqdm(questions, unit="page", disable=None)
    pages = (watch_answer(vlm, prompt, image, args.max_new_tokens) for prompt, image in progress)
    stats = mean_statistics(pages, args.top, args.distances)
    write_json(args.json, stats)
    if args.plot:
        write_whole(args.plot, lambda path: draw_statistics(stats, path))
    print("\n".join(summary_lines(stats)))


def _parser() -> Parser:
    parser = Parser(__doc__)
    parser.model_flags()
    parser.flag(
        "image",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help="pages; --prompt is asked about each of them",
    )
    parser.flag("prompt", metavar="TEXT", help="the question about the pages of --image")
    parser.flag(
        "pages",
        type=int,
        default=20,
        metavar="N",
        help="number of held-out pages, drawn by --seed, without --image (20)",
    )
    parser.flag(
        "max_new_tokens",
        type=int,
        default=DEMO.max_new_tokens,
        metavar="N",
        help=f"longest answer, in tokens ({DEMO.max_new_tokens})",
    )
    parser.flag(
        "top",
        nargs="+",
        type=float,
        default=[0.1, 0.3, 0.5],
        metavar="P",
        help="compare these shares of the vision tokens (0.1 0.3 0.5)",
    )
    parser.flag(
        "distances",
        type=int,
        default=16,
        metavar="K",
        help="compare steps that are up to K apart (16)",
    )
    parser.flag("json", type=Path, required=True, metavar="OUT.json", help="write all statistics")
    parser.flag("plot", type=Path, metavar="OUT.png", help="draw them (needs matplotlib)")
    return parser


def _questions(args: argparse.Namespace) -> list[tuple[str, Image.Image]]:
    """The prompts and images to ask about."""
    if args.image:
        return [(args.prompt, load_image(path)) for path in args.image]
    dataset = DEMO.open(None, args.seed, args.pages)
    return [(DEMO.prompt(sample), dataset.image(sample.index)) for sample in dataset.samples]


def summary_lines(stats: dict[str, Any]) -> list[str]:
    """The means of `eval.attention.statistics.mean_statistics`, one to a line."""
    lines = [f"{stats['pages']} pages, {sum(stats['steps'])} steps, {stats['layers']} layers"]
    for concordance in stats["concordance"]:
        layers, steps = concordance["between_layers_mean"], concordance["between_steps_mean"][0]
        between_layers = "a single layer" if layers is None else f"{layers:.3f} between layers"
        between_steps = "no answer of two steps" if steps is None else f"{steps:.3f} between neighbouring steps"
        share = concordance["share"]
        lines.append(f"concordance of the top {share:.0%} (by chance {share:.3f}): {between_layers}, {between_steps}")
    means = {name: sum(mass["by_layer"]) / len(mass["by_layer"]) for name, mass in stats["mass"].items()}
    return [
        *lines,
        "share of attention: " + ", ".join(f"{name} {mean:.3f}" for name, mean in means.items()),
    ]
