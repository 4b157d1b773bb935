"""The standard streams of a command, whatever they are: closed, full, without a reader, ASCII only.

Text that a stream cannot encode is written with escapes. What cannot be written on standard output ends the command;
what cannot be written on standard error is lost, for there is nobody to tell. A command that is refused prints a single
line, so notes wait until it has something to show.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from minivlm.files import reason


class OutputError(Exception):
    """Standard output cannot be written. No `UserError`, so that no turn of a conversation passes over it."""


class _Stream:
    """A standard stream that is written to; `stream` None was closed before the command began."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        if getattr(stream, "errors", None) == "strict" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            if self._stream is None:
                raise OSError("it is closed")
            self._stream.write(text)
        except OSError as error:
            self._failed(error)
        return len(text)

    def flush(self) -> None:
        try:
            if self._stream is not None:
                self._stream.flush()
        except OSError as error:
            self._failed(error)

    def _failed(self, error: OSError) -> None:
        # Python flushes the stream once more when it exits; redirected to the null device, that cannot fail.
        with suppress(AttributeError, OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


class ErrorStream(_Stream):
    """Standard error, with the notes that wait until something else is printed."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self.notes: list[str] = []

    def write(self, text: str) -> int:
        self.print_notes()
        return super().write(text)

    def print_notes(self) -> None:
        notes, self.notes = self.notes, []
        for line in notes:
            super().write(line)


class _Output(_Stream):
    def __init__(self, stream: Any, errors: ErrorStream) -> None:
        super().__init__(stream)
        self._errors = errors

    def write(self, text: str) -> int:
        self._errors.print_notes()
        return super().write(text)

    def _failed(self, error: OSError) -> None:
        super()._failed(error)
        if isinstance(error, BrokenPipeError):
            raise error
        raise OutputError(f"standard output cannot be written ({reason(error)})") from None


@contextmanager
def standard_streams() -> Iterator[ErrorStream]:
    """Put such streams in the place of `sys.stdin`, `sys.stdout` and `sys.stderr`. A closed stdin is an empty one.

    Gives the new `sys.stderr`.
    """
    before = sys.stdin, sys.stdout, sys.stderr
    for number in range(3):  # a closed one's number would go to the next file that is opened
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    if getattr(sys.stdin, "errors", None) == "strict" and hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="surrogateescape")  # a line that is not text is a mistake of that line only
    sys.stdin = io.StringIO() if sys.stdin is None else sys.stdin
    errors = ErrorStream(sys.stderr)
    sys.stdout, sys.stderr = _Output(sys.stdout, errors), errors
    try:
        yield errors
    finally:
        sys.stdin, sys.stdout, sys.stderr = before
