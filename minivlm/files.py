"""Reading JSON files from outside, and writing files so that a failure never leaves half of one."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from minivlm.errors import UserError


def read_json_object(path: Path) -> dict:
    """The object in a JSON file, or an empty one if there is no such file.

    Raises `UserError` for a file that cannot be read or holds anything else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:  # RecursionError: brackets nested too deeply
        raise UserError(f"{path}: not a readable JSON file ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__} (expected an object)")
    return content


def expect_writable(path: Path) -> None:
    """Check that `write_whole` can create `path`; for use before long work whose result it takes.

    Raises `UserError` if `path` is a folder, or if its parent folder is missing or cannot be
    written.
    """
    if path.is_dir():
        raise UserError(f"{path}: is a folder (expected the name of a file to write)")
    if not path.parent.is_dir():
        raise UserError(f"{path}: there is no folder {path.parent} to write it into")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise UserError(f"{path}: cannot be written (no permission for {path.parent})")


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write `path` completely or not at all.

    `write` receives the path of a scratch file in the same folder. The scratch file replaces `path`
    only if `write` succeeds. Raises `UserError` if the folder or the file cannot be written.
    """
    path = Path(path)
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
        os.close(handle)
        os.chmod(name, 0o666 & ~_umask())  # as `open` would; mkstemp makes private files
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None
    try:
        write(Path(name))
        os.replace(name, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None
    finally:
        Path(name).unlink(missing_ok=True)


def _umask() -> int:
    """The process's umask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
