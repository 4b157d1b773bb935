"""What all command lines share: flags in both spellings, errors of one line, exit statuses."""

from __future__ import annotations

import argparse
import logging
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from minivlm.app.policy_flags import given, spellings, without_effect
from minivlm.app.streams import ErrorStream, OutputError, standard_streams
from minivlm.app.values import READERS
from minivlm.cache.settings import CacheSettings
from minivlm.errors import UserError, printable


class Parser(argparse.ArgumentParser):
    """A parser that raises `UserError` for bad arguments and accepts no abbreviated flags."""

    def __init__(self, description: str | None, prog: str | None = None) -> None:
        super().__init__(
            prog,
            description=description,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        raise UserError(message)

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]
        """As argparse does it, but `--flag=--` is refused: before Python 3.13, argparse takes it for an empty list."""
        for word in args or ():
            if re.fullmatch(r"--[^=]+=--", word):
                self.error(f"{word} has no value")
        return super().parse_known_args(args, namespace)

    def flag(self, name: str, **options: Any) -> None:
        """Add a flag in both spellings, `--like_this` and `--like-this`.

        `options` are those of `add_argument`; the types int and float take no number that torch
        cannot hold (see `minivlm.app.values`).
        """
        if "type" in options:
            options["type"] = READERS.get(options["type"], options["type"])
        self.add_argument(*spellings(name), **{"dest": name, **options})

    def switch(self, name: str, *, default: bool | None = False, help: str) -> None:
        """Add a boolean flag, which takes true/false or stands alone."""
        stands_alone = dict(nargs="?", const=True, metavar="BOOL")
        self.flag(name, type=bool, default=default, help=help, **stands_alone)

    def model_flags(self) -> None:
        """Add the flags of every script that loads a model."""
        self.flag(
            "model",
            metavar="DIR|HUB_ID",
            help="a checkpoint folder, or a repository on the Hugging Face hub (the bundled demo)",
        )
        self.device_flags()
        self.flag("seed", type=int, default=0, help="seed for everything random (0)")

    def device_flags(self) -> None:
        """Add the flags that say where a model computes, and in which dtype."""
        self.flag(
            "device",
            default="auto",
            choices=("auto", "cpu", "cuda"),
            help="(auto: CUDA if there is a GPU)",
        )
        self.flag(
            "dtype",
            default="auto",
            choices=("auto", "float32", "bfloat16", "float16"),
            help="(auto: the checkpoint's dtype on CUDA, float32 on the CPU)",
        )

    def question_flags(self, images: str) -> None:
        """Add `--image` and `--prompt`; `images` says what the images are for."""
        self.flag("image", nargs="+", action="extend", type=Path, default=[], metavar="FILE", help=images)
        self.flag("prompt", metavar="TEXT", help="the question; <image> marks the place of an image")


def run(main: Callable[[Sequence[str]], None], arguments: Sequence[str] | None = None) -> None:
    """Run a script's `main`.

    A user's mistake, too little memory, and an output that cannot be written become one line on
    stderr and exit status 2; Ctrl-C becomes exit status 130, a reader that went away 1. What else
    is raised is a bug, and keeps its traceback.
    """
    # What Pillow warns of and logs is either harmless or an error that it raises as well.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    logging.getLogger("PIL").addHandler(logging.NullHandler())
    with standard_streams() as errors:
        try:
            try:
                main(sys.argv[1:] if arguments is None else arguments)
            finally:
                sys.stdout.flush()
            errors.print_notes()
        except (UserError, OutputError) as error:
            errors.notes.clear()
            complain(error)
            sys.exit(2)
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            errors.notes.clear()
            complain(UserError("out of memory (expected less: a smaller model, smaller numbers, or fewer inputs)"))
            sys.exit(2)
        except KeyboardInterrupt:
            print(file=sys.stderr)
            sys.exit(130)
        except BrokenPipeError:  # the reader of our output is gone, so there is nobody to tell
            sys.exit(1)


def _is_out_of_memory(error: Exception) -> bool:
    """Whether Python or torch could not allocate; torch says so in words, except on a GPU."""
    words = "can't allocate memory|not enough memory|bad_alloc|out of memory"
    return isinstance(error, MemoryError) or re.search(words, str(error)) is not None


def complain(error: Exception) -> None:
    """Report a user's mistake in one line on stderr."""
    print(f"error: {error}", file=sys.stderr)


def note(text: str) -> None:
    """Report in one line on stderr something that is not a mistake but may surprise the user.

    In a command it waits until that prints something, or until `say_notes`.
    """
    line = f"note: {printable(text, 5000)}\n"  # a path may have 4096 characters
    if isinstance(sys.stderr, ErrorStream):
        sys.stderr.notes.append(line)
    else:
        sys.stderr.write(line)


def say_notes() -> None:
    """Say the notes that wait: from here on, a command is not refused any more."""
    if isinstance(sys.stderr, ErrorStream):
        sys.stderr.print_notes()


def note_settings(settings: CacheSettings, args: argparse.Namespace, images: bool = True) -> None:
    """Report what may surprise a user about the policy, if the command line chose one.

    `images` says whether the prompt has images.
    """
    if "policy" in vars(args) or given(args):
        for line in (*without_effect(args), *settings.notes(images)):
            note(line)
