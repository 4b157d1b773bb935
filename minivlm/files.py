"""Files named by a user: reading only what is a file, and writing so that a failure never leaves half of one.

A name may be anything: missing, a folder, a device or a FIFO (opening one would wait for its other end), a link to
itself, too long for the system, not text. `open_file` turns each of these into one line, at once.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable
from io import BufferedReader
from pathlib import Path

from minivlm.errors import UserError

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}
_MAX_BYTES = 1 << 28  # of a file that is read whole; the largest tokenizers and data sets have a tenth of that


def user_path(name: str | Path) -> Path:
    """A path as a user writes it: `~` is the home folder. That of an unknown user stays as it is."""
    return Path(os.path.expanduser(name))  # Path.expanduser raises RuntimeError for one


def open_file(path: Path) -> BufferedReader:
    """A regular file, opened for reading.

    Raises `UserError` for anything else, without waiting: a FIFO or a device is not read.
    """
    try:
        # A FIFO or a device is not even opened: that can release a waiting writer, or start the device.
        kind = stat.S_IFMT(os.stat(path).st_mode)
        if kind == stat.S_IFREG:
            return open(path, "rb")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise UserError(f"{path}: cannot be read ({reason(error)})") from None
    raise UserError(f"{path}: is {_KINDS.get(kind, 'no file')} (expected a file)")


def read_bytes(path: Path) -> bytes:
    """The content of a regular file. Raises `UserError` if it cannot be read or is enormous."""
    with open_file(path) as file:
        try:
            content = file.read(_MAX_BYTES + 1)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({reason(error)})") from None
    if len(content) > _MAX_BYTES:
        raise UserError(f"{path}: is larger than {_MAX_BYTES >> 20} MiB (expected a small file)")
    return content


def exists(path: Path) -> bool:
    """Whether there is anything of this name, a dangling link included.

    False for names that the system cannot have (too long, with a zero byte).
    """
    try:
        os.lstat(path)
    except (OSError, ValueError):
        return False
    return True


def is_folder(path: Path) -> bool:
    """Whether this is a folder or a link to one; false also for names that the system cannot have."""
    return os.path.isdir(path)


def make_folder(path: Path) -> None:
    """Make a folder, and those that it lies in, unless it is there. Raises `UserError` if that is impossible."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be made a folder ({reason(error)})") from None


def expect_writable(path: Path) -> None:
    """Check that `write_whole` can write `path`; for use before long work whose result it takes.

    Raises `UserError` if `path` is a folder, if its parent folder is missing, or if one of them
    cannot be written.
    """
    target, current = _target(path)
    parent = target.parent
    if current is None or stat.S_ISREG(current.st_mode):
        if not is_folder(parent):
            raise UserError(f"{path}: there is no folder {parent} to write it into")
        if not os.access(parent, os.W_OK | os.X_OK):
            raise UserError(f"{path}: cannot be written (no permission for {parent})")
    if current is not None and not os.access(target, os.W_OK):
        raise UserError(f"{path}: cannot be written (no permission)")


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write `path` completely or not at all.

    `write` receives the path of a scratch file with the same suffix, which then takes the place of
    `path`, with the permissions that `path` has or that the umask gives to a new file. Through a
    link, the file that it points to is written. What exists and is no regular file (a device, a
    FIFO) is never replaced: the finished content is written into it. Raises `UserError` if that is
    impossible.
    """
    target, current = _target(path)
    try:
        if current is None or stat.S_ISREG(current.st_mode):
            _write_beside(target, current, write)
        else:
            _write_into(target, write)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({reason(error)})") from None


def reason(error: Exception) -> str:
    """Why the system refused a name or a file, in a few words."""
    words = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(words.split()) or type(error).__name__


def _target(path: Path) -> tuple[Path, os.stat_result | None]:
    """The file that `path` stands for, behind all links, and its status; None for a file that is still to be made.

    Raises `UserError` for a folder, a socket, and a name that the system cannot have.
    """
    try:
        current = os.stat(path)
    except FileNotFoundError:
        return Path(os.path.realpath(path)), None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise UserError(f"{path}: cannot be written ({reason(error)})") from None
    if stat.S_ISDIR(current.st_mode):
        raise UserError(f"{path}: is a folder (expected the name of a file to write)")
    if stat.S_ISSOCK(current.st_mode):
        raise UserError(f"{path}: cannot be written (it is a socket)")
    # What /dev/stdout points to may be a pipe, which has no name of its own.
    return Path(os.path.realpath(path) if stat.S_ISREG(current.st_mode) else path), current


def _write_beside(target: Path, current: os.stat_result | None, write: Callable[[Path], object]) -> None:
    """Write a scratch file in the folder of `target`, and rename it."""
    scratch = target.with_name(f".minivlm-{secrets.token_hex(8)}{target.suffix[:16]}")
    os.close(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))
    try:
        # `write` may replace the scratch file by one of its own, with other permissions.
        mode = stat.S_IMODE(scratch.stat().st_mode if current is None else current.st_mode)
        write(scratch)
        os.chmod(scratch, mode)
        os.replace(scratch, target)
    finally:
        scratch.unlink(missing_ok=True)


def _write_into(target: Path, write: Callable[[Path], object]) -> None:
    """Write a scratch file elsewhere, and copy it into a device or FIFO."""
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder) / f"content{target.suffix[:16]}"
        write(scratch)
        try:
            # Without blocking, a FIFO that nobody reads is refused at once; written it is as usual.
            handle = os.open(target, os.O_WRONLY | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK)
        except OSError as error:
            if error.errno == errno.ENXIO:
                raise OSError(error.errno, "nobody reads it") from None
            raise
        with os.fdopen(handle, "wb") as out, open(scratch, "rb") as content:
            os.set_blocking(handle, True)
            shutil.copyfileobj(content, out)
