"""Calling the scripts: in this process, where nothing is different but the speed, or as the processes they are."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from unittest import mock

from PIL import Image

import tiny
from minivlm.app.cli import run
from paths import ROOT


@dataclass(frozen=True)
class Ran:
    status: int
    out: str
    err: str


@functools.cache
def script(name: str) -> ModuleType:
    """A script of scripts/, imported by its path."""
    spec = importlib.util.spec_from_file_location(f"script_{name}", ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def call(main: Callable[[Sequence[str]], None], *arguments: object, stdin: str = "") -> Ran:
    """A script's `main` under `minivlm.app.cli.run`, as the script itself calls it."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    with (
        mock.patch.object(sys, "stdin", io.StringIO(stdin)),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            run(main, [str(argument) for argument in arguments])
        except SystemExit as end:
            status = end.code or 0
    return Ran(status, out.getvalue(), err.getvalue())


GENERATE = script("generate")


def generate(*arguments: object, stdin: str = "") -> Ran:
    return call(GENERATE.main, *arguments, stdin=stdin)


def endless_model(folder: Path, **text: object) -> Path:
    """A checkpoint that never ends an answer by itself."""
    tiny.write(folder, "next-vicuna", text_config={"eos_token_id": tiny.VOCAB, **text})
    tiny.dump(folder / "generation_config.json", {})
    return folder


def start(name: str, *arguments: object, **environment: str) -> subprocess.Popen:
    """A script as a process of its own, with pipes of bytes."""
    command = [sys.executable, str(ROOT / "scripts" / f"{name}.py"), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def refused(ran: Ran, *said: str) -> None:
    """Exit status 2, nothing on stdout, and one line on stderr that says all of `said`."""
    assert ran.status == 2, ran
    assert ran.out == "", ran
    assert ran.err.startswith("error: ") and ran.err.count("\n") == 1 and ran.err.endswith("\n"), ran.err
    for part in said:
        assert str(part) in ran.err


def write_pages(folder: Path) -> list[Path]:
    """Two pictures of different shapes."""
    pages = [folder / "wide.png", folder / "tall.png"]
    Image.radial_gradient("L").resize((90, 70)).convert("RGB").save(pages[0])
    Image.linear_gradient("L").resize((50, 120)).convert("RGB").save(pages[1])
    return pages
