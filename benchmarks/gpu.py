"""Measure on a GPU, in one command, and write benchmarks/gpu/README.md; see eval/speed/gpu/command.py and `--help`."""

from eval.speed.gpu.command import run_gpu
from minivlm.app.cli import run

if __name__ == "__main__":
    run(run_gpu)
