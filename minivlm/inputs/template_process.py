"""A chat template rendered in a process with limits, so that no template can take the machine.

Whatever a template computes, its process ends after a second of work or at a fixed size of memory
(see `template_sandbox`). This side waits only so long, reads only so much, and checks what it reads.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import markupsafe

from minivlm.inputs import template_sandbox
from minivlm.inputs.template_sandbox import MAX_SECONDS, TemplateFailure
from minivlm.schema import decode

_MAX_WAIT = 30  # seconds; much more than `MAX_SECONDS`, for loaded machines and slow disks
_MAX_LINE = 16 << 20  # bytes of a request or an answer; JSON writes each of `MAX_CHARACTERS` with at most 12
# What Python itself may need to start, and the time zone of `strftime_now`.
_ENVIRONMENT = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT", "TZ")


class ProcessEnded(TemplateFailure):
    """The process for a template cannot be started, or it ended without an answer."""


class TemplateProcess:
    """A template that is compiled and rendered by a process of its own.

    The process is started for the first rendering and kept for the next. It is replaced if it has
    ended, after a fork, and while another thread uses it. It ends with this object or with the
    interpreter; if the interpreter is killed, it ends because its requests do.
    """

    def __init__(self, source: str) -> None:
        self._source = source
        self._idle: list[_Worker] = []
        weakref.finalize(self, _end_all, self._idle)

    def render(self, variables: Mapping[str, Any]) -> str:
        """The text for variables that are plain data. Raises `TemplateFailure`."""
        request = json.dumps([self._source, variables]).encode() + b"\n"
        if len(request) > _MAX_LINE:
            raise TemplateFailure(f"the messages are too long for it ({len(request)} bytes)")
        worker = self._take()
        try:
            rendered, text = worker.ask(request)
        except BaseException:
            # Also after Ctrl-C: an answer that is still to come would be taken for that of the next request.
            worker.end()
            raise
        self._idle.append(worker)
        if not rendered:
            raise TemplateFailure(text)
        return text

    def _take(self) -> _Worker:
        """A worker that no one else uses. There is no lock, for which a fork could leave a child waiting."""
        while self._idle:
            worker = self._idle.pop()
            if worker.is_usable():
                return worker
            worker.end()
        return _Worker()


class _Worker:
    """A process that runs `template_sandbox`, and this side of its pipes."""

    def __init__(self) -> None:
        """Start the process. Raises `ProcessEnded` if that is not possible."""
        libraries = [str(Path(str(module.__file__)).parent.parent) for module in (jinja2, markupsafe)]
        try:
            self._process = subprocess.Popen(
                # With -I and -S, neither the environment nor the current folder decides what is imported.
                [sys.executable, "-I", "-S", "-B", template_sandbox.__file__, *libraries],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
                start_new_session=True,  # Ctrl-C in the terminal is not for the process
            )
        except OSError as error:
            raise ProcessEnded(f"the process for it cannot be started ({error})") from None
        assert self._process.stdin is not None and self._process.stdout is not None  # both are pipes
        self._requests, self._answers = self._process.stdin, self._process.stdout
        self._owner = os.getpid()

    def is_usable(self) -> bool:
        """Whether the process runs and is ours, not one that a fork has left us with."""
        return self._owner == os.getpid() and self._process.poll() is None

    def ask(self, request: bytes) -> tuple[bool, str]:
        """Whether the template rendered, and its text or else the reason. Raises `ProcessEnded`."""
        watch = threading.Timer(_MAX_WAIT, self._process.kill)
        try:
            watch.start()
        except RuntimeError as error:  # the system gives no more threads
            raise ProcessEnded(f"the process for it cannot be watched ({error})") from None
        line = b""
        try:
            self._requests.write(request)
            self._requests.flush()
            line = self._answers.readline(_MAX_LINE)
        except BrokenPipeError:
            pass  # the process has ended, and `line` says so
        finally:
            watch.cancel()
            watch.join()
        if not line.endswith(b"\n"):
            raise ProcessEnded(self.end())
        return decode(line, tuple[bool, str], "the process that renders the chat template")

    def end(self) -> str:
        """End the process, and say in words how it ended."""
        # After a fork it is not a child of ours. Popen finds that out: it sends no signal and does not wait.
        self._process.kill()
        status = self._process.wait()
        for pipe in (self._requests, self._answers):
            with contextlib.suppress(OSError):  # a request that could not be written is still in the buffer
                pipe.close()
        if sys.platform != "win32" and status == -signal.SIGPROF:
            return f"it takes longer than {MAX_SECONDS} second"
        if sys.platform != "win32" and status == -signal.SIGKILL:
            return f"the process that renders it was killed, or did not answer within {_MAX_WAIT} seconds"
        return f"the process that renders it ended with status {status}"


def _end_all(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.end()
