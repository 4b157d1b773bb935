"""Run the fuzzer: `python tests/fuzz/run.py --seed 7 --cases 10000`. docs/fuzzing.md explains it.

The fuzzer itself (`fuzzer/__main__.py`) runs in a process of its own, since threads, hashing and the hub's cache have
to be settled before Python and torch start.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

FUZZ = Path(__file__).resolve().parent


def main(arguments: list[str]) -> int:
    """Run the fuzzer in a temporary folder, which is kept if a single case is repeated; returns its exit status."""
    work = Path(tempfile.mkdtemp(prefix="minivlm-fuzz-"))
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, (FUZZ, FUZZ.parent / "helpers", FUZZ.parents[1]))),
        "PYTHONHASHSEED": "0",
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "HF_HOME": str(work / "hub"),
        "HF_HUB_OFFLINE": "1",
        "MPLCONFIGDIR": str(work / "matplotlib"),
    }
    try:
        command = [sys.executable, "-m", "fuzzer", "--work", str(work), *arguments]
        return subprocess.run(command, env=environment, cwd=work).returncode
    finally:
        if any(word.split("=")[0] == "--case" for word in arguments):
            print(f"the case's folder is kept: {work}")
        else:
            subprocess.run(["rm", "-rf", work])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
