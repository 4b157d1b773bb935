"""What all command lines share: flags in both spellings, errors in one line."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from minivlm.app.policy_flags import spellings
from minivlm.cache.settings import CacheSettings
from minivlm.errors import UserError


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are `UserError`s, and whose flags must be written out."""

    def __init__(self, description: str, prog: str | None = None) -> None:
        super().__init__(
            prog, description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
        )

    def error(self, message: str):
        raise UserError(message)

    def flag(self, name: str, **options) -> None:
        """Add `--like_this` and `--like-this`."""
        self.add_argument(*spellings(name), **{"dest": name, **options})

    def model_flags(self) -> None:
        """The flags of every script that loads a model."""
        self.flag("model", metavar="DIR|HUB_ID", help="a checkpoint (the bundled demo checkpoint)")
        self.flag("device", default="auto", choices=("auto", "cpu", "cuda"), help="(auto: CUDA where there is one)")
        self.flag(
            "dtype",
            default="auto",
            choices=("auto", "float32", "bfloat16", "float16"),
            help="(auto: the checkpoint's on CUDA, float32 on the CPU)",
        )
        self.flag("seed", type=int, default=0, help="of all that is random (0)")


def run(main: Callable[[Sequence[str]], None], arguments: Sequence[str] | None = None) -> None:
    """Run a script's `main`; a user's mistake becomes one line on stderr and exit status 2, Ctrl-C status 130."""
    try:
        main(sys.argv[1:] if arguments is None else arguments)
    except UserError as error:
        complain(error)
        sys.exit(2)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # the reader has gone: nothing to say, also not at exit
        sys.exit(1)


def complain(error: UserError) -> None:
    """Tell a user's mistake in one line on stderr."""
    print("error: " + " ".join(str(error).split()), file=sys.stderr)


def note(text: str) -> None:
    """Tell in one line on stderr what is no mistake, but may not be expected."""
    print(f"note: {text}", file=sys.stderr)


def note_settings(settings: CacheSettings, args: argparse.Namespace, images: bool = True) -> None:
    """Tell what a user who chose a policy may not expect of it, on a prompt with or without `images`."""
    if any(name == "policy" or name.startswith("cache.") for name in vars(args)):
        for line in settings.notes(images):
            note(line)
