"""Defects planted on purpose: `test_fuzz.py` expects that the harness notices each of them."""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from fuzzer.case import Box, Case, Expect, Family
from fuzzer.child import Ran
from minivlm.errors import UserError
from minivlm.files import write_whole


def misbehave(arguments: Sequence[str]) -> None:
    """A command: do what FAULT says, and answer, unless the fault prevents that."""
    fault = arguments[0]
    if fault in _FAULTS:
        _FAULTS[fault]()
    print("42")


def _complain() -> None:
    raise UserError("no such thing (expected another)")


def _complain_after(before: Callable[[], object]) -> Callable[[], None]:
    def fault() -> None:
        before()
        _complain()

    return fault


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _in_a_thread() -> None:
    thread = threading.Thread(target=lambda: 1 // 0)
    thread.start()
    thread.join()


def _crash() -> None:
    ctypes.string_at(0)


def _spin() -> None:
    while True:
        pass


def _fill_memory() -> None:
    bytearray(64 << 30)


def _half_a_file() -> None:
    Path("out/result").write_text("complete"[:4])


_FAULTS: dict[str, Callable[[], object]] = {
    "refusal": _complain,
    "traceback": lambda: 1 // 0,
    "traceback in a thread": _in_a_thread,
    "memory": _fill_memory,
    "crash": _crash,
    "hang": lambda: time.sleep(1000),
    "spin": _spin,
    "status": lambda: sys.exit(1),
    "no word": lambda: sys.exit(2),
    "second line": _complain_after(lambda: _say("error: something else first")),
    "chatter": lambda: _say("something"),
    "answer before a refusal": _complain_after(lambda: print("4")),
    "stray file": lambda: Path("out/stray").touch(),
    "scratch file": _complain_after(lambda: Path("tmp/scratch").touch()),
    "changed input": lambda: Path("in/page").write_text("other"),
    "half a file": _half_a_file,
    "whole file": lambda: write_whole(Path("out/result"), lambda path: path.write_text("complete")),
    "file elsewhere": lambda: Path("../elsewhere").write_text("here"),
    "rename elsewhere": lambda: os.rename("in/page", "../page"),
    "changed shared input": lambda: subprocess.run(["touch", "../../shared/wide.png"]),
    "connection": lambda: socket.socket().connect_ex(("127.0.0.1", 9)),
    "left running": lambda: subprocess.Popen(["sleep", "1000"], start_new_session=True),
    "wrong answer": lambda: print("4", end=""),
}
_OTHER = ("answer", "unexpected answer", "unexpected refusal")  # faults of what is expected, and none


def make_planted(fault: str) -> Family:
    """A case with the fault."""

    def make(box: Box) -> Case:
        box.write("page", b"page")
        expect = {"unexpected answer": Expect.REFUSAL, "unexpected refusal": Expect.ANSWER}.get(fault, Expect.EITHER)
        does = "refusal" if fault == "unexpected refusal" else fault
        return Case("misbehave", [does], expect, outputs=[box.out / "result"], check=lambda ran: _check(box, ran))

    return make


def _check(box: Box, ran: Ran) -> None:
    assert ran.out == "42\n"
    result = box.out / "result"
    assert not result.exists() or result.read_text() == "complete"


PLANTED: dict[str, Family] = {fault: make_planted(fault) for fault in (*_OTHER, *_FAULTS)}
