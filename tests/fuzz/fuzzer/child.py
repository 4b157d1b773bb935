"""Run a function in a forked child with limits on memory and time, and see how it ended.

Forking saves the seconds that torch takes to be imported: a case costs a tenth of a second. The parent must be single-
threaded and must not have run parallel torch code.
"""

from __future__ import annotations

import atexit
import ctypes
import io
import os
import resource
import select
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

MEMORY = 3 << 30  # bytes of address space that a child may take beyond what its parent has
CPU_S = 20  # of processor time; a case takes a tenth of a second
WALL_S = 60.0  # what waits for something needs no processor time
FILE_BYTES = 256 << 20  # of any file that it writes
_GRACE_S = 3.0  # for processes that a child has started to notice its end
_PR_SET_CHILD_SUBREAPER = 36
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_CHANGES = {  # audit events of functions that change a file system, and which of their arguments are names
    "os.rename": (0, 1),
    "os.link": (1,),
    "os.symlink": (1,),
    "os.remove": (0,),
    "os.rmdir": (0,),
    "os.mkdir": (0,),
    "os.truncate": (0,),
    "os.chmod": (0,),
    "os.chown": (0,),
    "os.utime": (0,),
}


@dataclass(frozen=True)
class Ran:
    """How a child ended, and what it wrote. `status` is minus the signal if one ended it."""

    status: int
    out: str
    err: str
    hung: bool = False  # it used up its time
    left_running: bool = False  # processes that it started live on
    touched: list[str] = field(default_factory=list)  # what it changed outside its folder, or reached over a network


def adopt_orphans() -> None:
    """Make this process the parent of its descendants' orphans, so that it sees what a child leaves running."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def run_forked(
    action: Callable[[], object],
    folder: Path,
    streams: Path,
    *,
    stdin: bytes | None = b"",
    stdout: str | Path = "file",
    wall_s: float = WALL_S,
) -> Ran:
    """Call `action` in a child whose current, home and temporary folders are in `folder`.

    The child's streams are files in `streams`. `stdin` and `stdout` are as in `Case`.
    """
    (streams / "in").write_bytes(stdin or b"")
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        try:
            _be_the_child(action, folder, streams, stdin is None, stdout)
        finally:
            os._exit(99)
    return _watch(pid, streams, wall_s)


def _watch(pid: int, streams: Path, wall_s: float) -> Ran:
    handle = os.pidfd_open(pid)
    in_time = False
    try:
        in_time = bool(select.select([handle], [], [], wall_s)[0])
    finally:  # also after Ctrl-C, which the child in its session of its own does not get
        os.close(handle)
        if not in_time:
            os.kill(pid, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    left_running = not _all_ended(_GRACE_S if in_time else 0.0)
    while not _all_ended(0.1):
        for orphan in Path("/proc/thread-self/children").read_text().split():
            os.kill(int(orphan), signal.SIGKILL)
    out, err, touched = ((streams / name).read_bytes() for name in ("out", "err", "touched"))
    return Ran(
        status,
        out.decode(errors="backslashreplace"),
        err.decode(errors="backslashreplace"),
        hung=not in_time or status in (-signal.SIGXCPU, -signal.SIGKILL),
        left_running=left_running and in_time,
        touched=list(dict.fromkeys(touched.decode(errors="backslashreplace").splitlines())),
    )


def _all_ended(grace_s: float) -> bool:
    """Whether all processes that a child has started have ended, at the latest after `grace_s`."""
    end = time.monotonic() + grace_s
    while True:
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return True
        if time.monotonic() >= end:
            return False
        time.sleep(0.005)


def _be_the_child(action: Callable[[], object], folder: Path, streams: Path, closed: bool, stdout: str | Path) -> None:
    """Never returns: the process ends here as a Python program does that has `action` as its last line."""
    os.setsid()
    _set_streams(streams, closed, stdout)
    touched = os.open(streams / "touched", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC)
    os.chdir(folder)
    os.environ.update(HOME=str(folder / "home"), TMPDIR=str(folder / "tmp"))
    tempfile.tempdir = None
    _set_limits()
    sys.addaudithook(_Witness(str(folder), touched))
    status = 0
    try:
        action()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except (OSError, ValueError):
        traceback.print_exc()
        status = 120
    if sys.stderr is not None:
        sys.stderr.flush()
    os._exit(status)


def _set_streams(streams: Path, closed: bool, stdout: str | Path) -> None:
    """Streams as the interpreter makes them for files, in a locale of UTF-8."""
    encoding = "ascii" if stdout == "ascii" else "utf-8"
    created = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    out = os.open(streams / "out", created)
    if isinstance(stdout, Path):
        out = os.open(stdout, os.O_WRONLY)
    for number, handle in enumerate((os.open(streams / "in", os.O_RDONLY), out, os.open(streams / "err", created))):
        os.dup2(handle, number)
    sys.stdin, sys.stdout = _text(0, "r", encoding, "strict"), _text(1, "w", encoding, "strict")
    sys.stderr = _text(2, "w", encoding, "backslashreplace", line_buffering=True)
    if closed:
        os.close(0)
        sys.stdin = None  # type: ignore[assignment]
    if stdout == "closed":
        os.close(1)
        sys.stdout = None  # type: ignore[assignment]


def _text(number: int, mode: str, encoding: str, errors: str, **options: bool) -> IO[str]:
    stream: Any = os.fdopen(number, mode + "b", closefd=False)
    return io.TextIOWrapper(stream, encoding, errors, **options)


def _set_limits() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    memory = pages * os.sysconf("SC_PAGE_SIZE") + MEMORY
    for limit, most in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CPU, CPU_S),
        (resource.RLIMIT_FSIZE, FILE_BYTES),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (most, most + 2 * (limit == resource.RLIMIT_CPU)))


class _Witness:
    """An audit hook that notes what is changed outside of `folder`, and connections to other machines."""

    def __init__(self, folder: str, report: int) -> None:
        self.folder, self.report = os.path.realpath(folder), report

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(args[2], int) and args[2] & _WRITES:
            self._look(event, args[0], os.path.realpath)
        elif event in _CHANGES:
            for index in _CHANGES[event]:
                self._look(event, args[index], _without_last_link)
        elif event in ("socket.connect", "socket.getaddrinfo"):
            self._note(f"{event} {args!r}")

    def _look(self, event: str, name: Any, resolve: Callable[[str], str]) -> None:
        if not isinstance(name, (str, bytes, os.PathLike)):
            return  # an open file, which has been looked at when it was opened
        try:
            path = resolve(os.path.abspath(os.fsdecode(name)))
        except (OSError, ValueError):
            return  # no name at all; the call fails by itself
        harmless = path == os.devnull and event == "open"
        inside = path == self.folder or path.startswith(self.folder + os.sep)
        if not inside and not harmless and not path.startswith(f"/proc/{os.getpid()}/"):
            self._note(f"{event} {path!r}")

    def _note(self, line: str) -> None:
        os.write(self.report, f"{line}\n".encode(errors="backslashreplace"))


def _without_last_link(path: str) -> str:
    """A name behind all links but the last, which is what renaming and removing act on."""
    return os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
