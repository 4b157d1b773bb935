"""Run the scripts, in this process, which is faster, or as processes of their own."""

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
from paths import ROOT, SCRIPTS


@dataclass(frozen=True)
class Ran:
    """How a command ended, and what it wrote."""

    status: int
    out: str
    err: str


@functools.cache
def script(name: str) -> ModuleType:
    """A script of scripts/, imported by its path."""
    spec = importlib.util.spec_from_file_location(f"script_{name}", SCRIPTS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def call(main: Callable[[Sequence[str]], None], *arguments: object, stdin: str = "") -> Ran:
    """Call a script's `main` through `minivlm.app.cli.run`, as the script itself does."""
    out, err = io.StringIO(), io.StringIO()
    status = 0
    with (
        mock.patch.object(sys, "stdin", io.StringIO(stdin)),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            run(main, [str(argument) for argument in arguments])
        except SystemExit as error:
            status = error.code or 0
    return Ran(status, out.getvalue(), err.getvalue())


GENERATE = script("generate")


def generate(*arguments: object, stdin: str = "") -> Ran:
    return call(GENERATE.main, *arguments, stdin=stdin)


def endless_model(folder: Path, **text: object) -> Path:
    """A checkpoint whose answers go on until `max_new_tokens`: its end-of-sequence id is outside the vocabulary."""
    tiny.write(folder, "next-vicuna", text_config={"eos_token_id": tiny.VOCAB, **text})
    tiny.dump(folder / "generation_config.json", {})
    return folder


def start(name: str, *arguments: object, **environment: str) -> subprocess.Popen:
    """Start a script as a process of its own. Its three streams are pipes of bytes, which the caller closes."""
    return subprocess.Popen(
        [sys.executable, str(SCRIPTS / f"{name}.py"), *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def refused(ran: Ran, *said: str) -> None:
    """Expect exit status 2, nothing on stdout, and one line on stderr that contains all of `said`."""
    assert ran.status == 2, ran
    assert ran.out == "", ran
    assert ran.err.startswith("error: ") and ran.err.count("\n") == 1 and ran.err.endswith("\n"), ran.err
    for part in said:
        assert str(part) in ran.err, ran


def write_pages(folder: Path) -> list[Path]:
    """Write one wide and one tall image."""
    pages = [folder / "wide.png", folder / "tall.png"]
    Image.radial_gradient("L").resize((90, 70)).convert("RGB").save(pages[0])
    Image.linear_gradient("L").resize((50, 120)).convert("RGB").save(pages[1])
    return pages
