"""Trace a greedy answer; see minivlm/app/trace_command.py and `--help`."""

from __future__ import annotations

from collections.abc import Sequence

import weights
from minivlm.app import trace_command
from minivlm.app.cli import run


def main(arguments: Sequence[str]) -> None:
    trace_command.main(arguments, weights.load)


if __name__ == "__main__":
    run(main)
