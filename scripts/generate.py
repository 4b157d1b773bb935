"""Ask a checkpoint about images; see minivlm/app/generate_command.py and `--help`."""

from __future__ import annotations

from collections.abc import Sequence

import weights
from minivlm.app import generate_command
from minivlm.app.cli import run


def main(arguments: Sequence[str]) -> None:
    generate_command.main(arguments, weights.load)


if __name__ == "__main__":
    run(main)
