"""How long it takes to import the library after torch, and to answer with the bundled checkpoint.

Each time is the median of new processes.

python -m eval.speed.startup --json benchmarks/cpu-startup.json
"""

from __future__ import annotations

import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from eval.json_files import write_json
from eval.speed.machine import describe_machine
from minivlm.app.cli import Parser, run
from minivlm.errors import UserError
from minivlm.files import expect_writable

_ROOT = Path(__file__).resolve().parents[2]
_GENERATE = ["scripts/generate.py", "--device", "cpu", "--image", "weights/demo/pages/page_5.png"]
PROCESSES = {
    "python": ["-c", "pass"],
    "import torch": ["-c", "import torch"],
    "import torch, minivlm": ["-c", "import torch, minivlm"],
    "import torch, minivlm, weights": ["-c", "import torch, minivlm, weights"],
    "scripts/generate.py": [*_GENERATE, "--prompt", "What is the total?"],
}


def main(arguments: Sequence[str]) -> None:
    parser = Parser(__doc__, "python -m eval.speed.startup")
    parser.flag("repeats", type=int, default=7, metavar="N", help="of each process, in turns (7)")
    parser.flag("json", type=Path, metavar="OUT.json", help="write all times, with versions and the command")
    args = parser.parse_args(arguments)
    if args.repeats < 1:
        raise UserError(f"--repeats is {args.repeats} (expected at least 1)")
    if args.json:
        expect_writable(args.json)
    seconds: dict[str, list[float]] = {name: [] for name in PROCESSES}
    for turn in range(args.repeats + 1):
        for name, words in PROCESSES.items():
            started = time.perf_counter()
            subprocess.run([sys.executable, *words], cwd=_ROOT, check=True, stdout=subprocess.DEVNULL)
            if turn > 0:  # the first turn only brings the files into the page cache
                seconds[name].append(time.perf_counter() - started)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    beyond_torch = median["import torch, minivlm"] - median["import torch"]
    for name, value in median.items():
        print(f"{name}: {value:.2f} s")
    print(f"minivlm beyond torch: {beyond_torch:.2f} s")
    if args.json:
        result = {
            "command": shlex.join(["python", "-m", "eval.speed.startup", *arguments]),
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "machine": describe_machine(torch.device("cpu")),
            "seconds": {name: {"median": median[name], "all": times} for name, times in seconds.items()},
            "minivlm_beyond_torch": beyond_torch,
        }
        write_json(args.json, result)


if __name__ == "__main__":
    run(main)
