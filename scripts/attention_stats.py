"""Measure what attention looks at; see eval/attention/command.py and `--help`."""

from eval.attention.command import measure_attention
from minivlm.app.cli import run

if __name__ == "__main__":
    run(measure_attention)
