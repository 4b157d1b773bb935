"""The commands under test, called as their scripts call them, and as processes of their own to compare."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

# Imported here, and not by each case: the commands import these when they first need them.
import eval.accuracy.command
import eval.accuracy.compare
import eval.accuracy.sweep
import eval.speed.benchmark
from cli_helpers import script
from eval.__main__ import main as eval_main
from eval.attention.command import measure_attention
from eval.speed.machine import bandwidth
from fuzzer.caches import go_on
from fuzzer.case import Case
from fuzzer.child import Ran
from fuzzer.planted import misbehave
from minivlm.app.cli import run
from paths import ROOT, SCRIPTS


def run_benchmark(arguments: Sequence[str]) -> None:
    """The benchmark, but its measurement of the machine takes milliseconds instead of seconds."""
    eval.speed.benchmark.bandwidth = lambda device: bandwidth(device, nbytes=1 << 16)
    eval.speed.benchmark.run_benchmark(arguments)


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "generate.py": script("generate").main,
    "trace.py": script("trace").main,
    "benchmark.py": run_benchmark,
    "attention_stats.py": measure_attention,
    "eval": eval_main,
    "load_cache": go_on,
    "misbehave": misbehave,
}


def call(case: Case) -> None:
    """What the last line of the case's script does."""
    words = case.words()
    sys.argv = [case.command, *words]
    run(COMMANDS[case.command], words)


def run_real(case: Case, folder: Path) -> Ran:
    """The case as a process of its own, without limits; only for the four scripts and `eval`."""
    program = ["-m", "eval"] if case.command == "eval" else [str(SCRIPTS / case.command)]
    ran = subprocess.run(
        [sys.executable, *program, *case.words()],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(folder / "home"), "TMPDIR": str(folder / "tmp")},
        input=case.stdin or b"",
        capture_output=True,
    )
    out, err = (stream.decode(errors="backslashreplace") for stream in (ran.stdout, ran.stderr))
    return Ran(ran.returncode, out, err)
