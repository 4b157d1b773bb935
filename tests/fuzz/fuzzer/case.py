"""What a case is: a command with its inputs in a folder of its own, and what may come of it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from random import Random
from typing import Any

from fuzzer.child import Ran


class Expect(Enum):
    """What the rule lets a command do with its input."""

    EITHER = "an answer or a refusal"
    ANSWER = "an answer"  # the input is good, if odd
    REFUSAL = "a refusal"  # the input cannot be meant


@dataclass(frozen=True)
class Case:
    """One call of a command.

    `outputs` are the files or folders that an answer may write; a refusal writes nothing. `check` looks at an answer
    and raises an exception if it is wrong. `stdin` None is a closed one. `stdout` is "file", "closed", "ascii" (a
    stream that takes no other characters), or a path to write to. `answers_first` lets a refusal follow an answer: only
    writing shows that nobody reads a FIFO, since trying it would be the end of the file for a reader.
    """

    command: str  # a key of `fuzzer.commands.COMMANDS`
    arguments: Sequence[Any]
    expect: Expect = Expect.EITHER
    outputs: Sequence[Path] = ()
    check: Callable[[Ran], object] | None = None
    stdin: bytes | None = b""
    stdout: str | Path = "file"
    answers_first: bool = False

    @property
    def is_chat(self) -> bool:
        return self.command == "generate.py" and "--chat" in self.words()

    def words(self) -> list[str]:
        """The arguments as the command gets them."""
        return [os.fsdecode(argument) if isinstance(argument, bytes) else str(argument) for argument in self.arguments]


@dataclass(frozen=True)
class Box:
    """A case's own folder, its current directory: `inputs` for what it reads, `out` for what it writes.

    `shared` has the good inputs of `fuzzer.world`, which no case may change. `clean` runs a command on good inputs in a
    box of its own (once; then its result is known).
    """

    root: Path
    rng: Random
    shared: Path
    clean: Callable[..., Ran]

    @classmethod
    def make(cls, root: Path, rng: Random, shared: Path, clean: Callable[..., Ran]) -> Box:
        for name in ("in", "out", "home", "tmp"):
            (root / name).mkdir(parents=True)
        return cls(root, rng, shared, clean)

    @property
    def inputs(self) -> Path:
        return self.root / "in"

    @property
    def out(self) -> Path:
        return self.root / "out"

    def write(self, name: str | bytes, content: bytes) -> Path:
        """Write a file among the inputs; one that is there, perhaps a link to a shared one, is replaced."""
        path = self.inputs / os.fsdecode(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.write_bytes(content)
        return path

    def copy(self, name: str, to: Path | None = None) -> Path:
        """A copy of a shared file or folder, among the inputs or at `to`."""
        target = to or self.inputs / name
        if (self.shared / name).is_dir():
            shutil.copytree(self.shared / name, target)
        else:
            shutil.copy2(self.shared / name, target)
        return target


Family = Callable[[Box], Case]
