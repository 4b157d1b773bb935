"""How long it takes to import the library beyond torch, and to answer with the bundled checkpoint; medians of new processes.

python benchmarks/startup.py --json benchmarks/cpu-startup.json
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

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from eval.accuracy.results import write_json  # noqa: E402
from eval.speed.benchmark import machine  # noqa: E402
from minivlm.app.cli import Parser, run  # noqa: E402
from minivlm.files import expect_writable  # noqa: E402

PAGE = ROOT / "weights" / "demo" / "pages" / "page_5.png"
PROCESSES = {
    "python": ["-c", "pass"],
    "import torch": ["-c", "import torch"],
    "import torch, minivlm": ["-c", "import torch, minivlm"],
    "import torch, minivlm, weights": ["-c", "import torch, minivlm, weights"],
    "scripts/generate.py": [
        str(ROOT / "scripts" / "generate.py"),
        "--device",
        "cpu",
        "--image",
        str(PAGE),
        "--prompt",
        "What is the total?",
    ],
}


def main(arguments: Sequence[str]) -> None:
    parser = Parser(__doc__)
    parser.flag("repeats", type=int, default=7, metavar="N", help="of each process, in turns (7)")
    parser.flag("json", type=Path, metavar="OUT.json")
    args = parser.parse_args(arguments)
    if args.json:
        expect_writable(args.json)
    seconds: dict[str, list[float]] = {name: [] for name in PROCESSES}
    for turn in range(args.repeats + 1):
        for name, words in PROCESSES.items():
            started = time.perf_counter()
            subprocess.run([sys.executable, *words], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
            if turn:  # the first brings files into the page cache
                seconds[name].append(time.perf_counter() - started)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    found = {
        "command": shlex.join(["python", "benchmarks/startup.py", *arguments]),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "machine": machine(torch.device("cpu")),
        "seconds": {name: {"median": median[name], "all": times} for name, times in seconds.items()},
        "minivlm_beyond_torch": median["import torch, minivlm"] - median["import torch"],
    }
    for name, value in median.items():
        print(f"{name}: {value:.2f} s")
    print(f"minivlm beyond torch: {found['minivlm_beyond_torch']:.2f} s")
    if args.json:
        write_json(args.json, found)


if __name__ == "__main__":
    run(main)
