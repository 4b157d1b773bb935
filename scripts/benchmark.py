"""Time KV policies on a model shape; see eval/speed/benchmark.py and `--help`."""

from eval.speed.benchmark import run_benchmark
from minivlm.app.cli import run

if __name__ == "__main__":
    run(run_benchmark)
