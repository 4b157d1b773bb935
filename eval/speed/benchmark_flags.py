"""The flags of `scripts/benchmark.py`, and the policies that they name."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from eval.figures import expect_figure
from eval.speed.shapes import SHAPES
from minivlm.app import policy_flags
from minivlm.app.cli import Parser, note
from minivlm.cache.settings import CacheSettings
from minivlm.errors import UserError
from minivlm.files import expect_writable

_BOUNDS = {
    "vision_tokens": (0, 1 << 20),
    "text_tokens": (1, 1 << 20),
    "batch": (1, 1 << 12),
    "new_tokens": (1, 1 << 20),
    "repeats": (1, 1 << 20),
    "prefills": (1, 1 << 20),
}


@dataclass(frozen=True)
class Candidate:
    """A policy to time: its label in the table, its settings, and whether it runs compiled."""

    label: str
    settings: CacheSettings
    compiled: bool


def parse_benchmark(arguments: Sequence[str], description: str | None) -> tuple[argparse.Namespace, list[str]]:
    """Parse the flags of the benchmark.

    Also returns what is left: flags of the cache, which hold for all policies.
    """
    parser = Parser(description)
    _add_case_flags(parser)
    _add_run_flags(parser)
    args, cache_flags = parser.parse_known_args(arguments)
    for name, (least, most) in _BOUNDS.items():
        values = getattr(args, name)
        for value in values if isinstance(values, list) else [values]:
            if value < least:
                raise UserError(f"--{name} is {value} (expected at least {least})")
            if value > most:
                raise UserError(f"--{name} is {value} (expected at most {most})")
    if args.json:
        expect_writable(args.json)
    if args.plot:
        expect_figure(args.plot)
    return args, cache_flags


def _add_case_flags(parser: Parser) -> None:
    """The flags that say what is timed."""
    parser.flag(
        "shape",
        required=True,
        metavar="NAME|DIR",
        help=f"{', '.join(SHAPES)}, or a checkpoint folder",
    )
    parser.switch(
        "random_weights",
        help="use only the shape of a checkpoint folder (a named shape always has random weights)",
    )
    parser.flag(
        "vision_tokens",
        type=int,
        nargs="+",
        default=[2880],
        metavar="N",
        help="image tokens of a prompt (2880)",
    )
    parser.flag(
        "text_tokens",
        type=int,
        default=70,
        metavar="T",
        help="text tokens of a prompt, half of them before the image (70)",
    )
    parser.flag("batch", type=int, nargs="+", default=[1], metavar="B", help="prompts answered at once (1)")
    parser.flag(
        "policy",
        nargs="*",
        default=["full"],
        metavar="POLICY",
        help="one quoted argument per policy: NAME, 'NAME FLAG...', or 'LABEL: NAME FLAG...'. The others are compared "
        "to the first. Flags of the cache, and --compile, that stand outside hold for all policies. Without a value, "
        "only peers are timed (full)",
    )
    parser.flag(
        "peers",
        nargs="+",
        default=[],
        metavar="NAME[:VARIANT]",
        help="other implementations to time in the same run, from eval/speed/peer_NAME.py: "
        "transformers, transformers:static",
    )


def _add_run_flags(parser: Parser) -> None:
    """The flags that say how it is timed, and what is written."""
    parser.flag("new_tokens", type=int, default=6, metavar="N", help="decode steps timed in each turn (6)")
    parser.flag("repeats", type=int, default=3, metavar="N", help="turns of each contender (3)")
    parser.flag(
        "prefills",
        type=int,
        default=1,
        metavar="N",
        help="prefills of each contender, in turns; of several, the first does not count (1)",
    )
    _add_compile_flags(parser, default=True)
    parser.switch("largest_batch", help="also find each policy's largest batch that fits the GPU")
    parser.switch("profile", help="also show where the time of a prefill and of a decode step goes")
    parser.device_flags()
    parser.flag("seed", type=int, default=0, help="seed of weights and prompts (0)")
    parser.flag(
        "json",
        type=Path,
        metavar="OUT.json",
        help="write all measurements, with versions and the command",
    )
    parser.flag(
        "plot",
        type=Path,
        metavar="OUT.png",
        help="draw decode time against vision tokens, or batch size",
    )


def _add_compile_flags(parser: Parser, default: bool) -> None:
    parser.switch(
        "compile",
        default=default,
        help="torch.compile decode steps and the prefill's blocks (true)",
    )
    parser.flag("no_compile", dest="compile", action="store_false", help="run eagerly")


def parse_candidate(text: str, cache_flags: Sequence[str], seed: int, compiled: bool) -> Candidate:
    """Parse a value of --policy: `NAME FLAG...`, maybe with `LABEL: ` in front.

    `cache_flags` and `compiled` hold unless the policy's own flags override them.
    """
    label, colon, described = text.partition(": ")
    try:
        words = shlex.split(described if colon else text)
    except ValueError as error:  # a quotation mark without another
        raise UserError(f"--policy {text!r}: {error} (expected a name and flags, as in a shell)") from None
    words = ["--policy", *words[:1], *cache_flags, *words[1:]]
    parser = Parser("")
    policy_flags.add_arguments(parser, words)
    _add_compile_flags(parser, default=compiled)
    args = parser.parse_args(words)
    for line in policy_flags.without_effect(args):
        note(line)
    return Candidate(label if colon else text, policy_flags.from_args(args, seed), args.compile)
