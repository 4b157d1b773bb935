"""Files named by a user: what is read, what is refused at once, and what a failed write leaves behind."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from minivlm.errors import UserError
from minivlm.files import exists, expect_writable, is_folder, make_folder, open_file, read_bytes, write_whole
from paths import ROOT

NULL, FULL, ZERO = (os.makedev(1, minor) for minor in (3, 7, 5))


def device(path: Path, number: int) -> Path:
    """A device node of one's own. Never one of /dev: what replaces that harms the whole machine."""
    try:
        os.mknod(path, 0o666 | stat.S_IFCHR, number)
        os.close(os.open(path, os.O_WRONLY))
    except OSError as error:
        pytest.skip(f"no device nodes here: {error}")
    return path


def fifo(path: Path) -> Path:
    os.mkfifo(path)
    return path


def link(path: Path, target: object) -> Path:
    path.symlink_to(str(target))
    return path


def content(data: bytes = b"new") -> Callable[[Path], object]:
    return lambda scratch: scratch.write_bytes(data)


def refusal(call: Callable[..., object], *arguments: object) -> str:
    with pytest.raises(UserError) as error:
        call(*arguments)
    message = str(error.value)
    assert "\n" not in message and message.startswith(str(UserError(str(arguments[0])))[:300])
    return message


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


NO_FILES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing": (lambda f: f / "x", "no such file"),
    "folder": (lambda f: f, "is a folder (expected a file)"),
    "FIFO": (lambda f: fifo(f / "x"), "is a FIFO (expected a file)"),
    "link to a FIFO": (lambda f: link(f / "y", fifo(f / "x")), "is a FIFO"),
    "device": (lambda f: device(f / "x", ZERO), "is a device (expected a file)"),
    "link to a device": (lambda f: link(f / "x", "/dev/zero"), "is a device"),
    "dangling link": (lambda f: link(f / "x", f / "nowhere"), "no such file"),
    "looping link": (lambda f: link(f / "x", f / "x"), "cannot be read (Too many levels"),
    "in a file": (lambda f: Path(__file__) / "x", "cannot be read (Not a directory)"),
    "too long": (lambda f: f / ("x" * 300), "cannot be read (File name too long)"),
    "path too long": (lambda f: Path("x/" * 3000), "cannot be read (File name too long)"),
    "zero byte": (lambda f: Path("a\0b"), "cannot be read (embedded null byte"),
    "surrogate": (lambda f: f / "\ud800", "cannot be read ("),
    "not UTF-8": (lambda f: f / "\udcff", "no such file"),
}


@pytest.mark.parametrize("name", NO_FILES)
def test_what_is_no_file_is_refused_at_once(name, tmp_path):
    make, said = NO_FILES[name]
    path = make(tmp_path)
    for read in (open_file, read_bytes):
        assert said in refusal(read, path)


def test_a_socket_is_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the names of sockets are short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("x")
        assert refusal(open_file, Path("x")) == "x: is a socket (expected a file)"
        assert "is a socket" in refusal(write_whole, Path("x"), content())
    assert left(tmp_path) == ["x"]


def test_a_refused_fifo_does_not_release_its_writer(tmp_path):
    path = fifo(tmp_path / "x")
    writer = threading.Thread(target=path.write_bytes, args=(b"waits",))
    writer.start()
    refusal(open_file, path)
    assert writer.is_alive()
    assert path.read_bytes() == b"waits"
    writer.join(timeout=60)


def test_what_is_a_file_is_read(tmp_path):
    path = tmp_path / os.fsdecode(b"\xff.txt")
    path.write_bytes(b"text")
    for place in (path, link(tmp_path / "link", path)):
        assert read_bytes(place) == b"text"
        with open_file(place) as file:
            assert file.read(2) == b"te"


def test_an_enormous_file_is_not_read(tmp_path):
    path = tmp_path / "x"
    path.touch()
    os.truncate(path, (1 << 28) + 1)  # sparse
    assert "larger than 256 MiB" in refusal(read_bytes, path)


def test_exists_and_is_folder_of_any_name(tmp_path):
    assert exists(tmp_path) and exists(link(tmp_path / "dangling", "nowhere"))
    for name in ("nowhere", "x" * 300, "a\0b", "\ud800"):
        assert not exists(tmp_path / name) and not is_folder(tmp_path / name)
    assert is_folder(link(tmp_path / "here", tmp_path)) and not is_folder(tmp_path / "dangling")


# Writing


def test_folders_are_made(tmp_path):
    for _ in range(2):
        make_folder(tmp_path / "a" / "b")
    assert is_folder(tmp_path / "a" / "b")
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "x", tmp_path / ("x" * 300), tmp_path / "a\0b"):
        assert "cannot be made a folder" in refusal(make_folder, path)


def save_tensors(scratch: Path) -> None:
    save_file({"x": torch.ones(3)}, scratch)


@pytest.mark.parametrize("write", [content(), save_tensors])
def test_permissions_are_the_umasks_or_those_of_the_old_file(write, tmp_path):
    new, old = tmp_path / "new", tmp_path / "old"
    before = os.umask(0o027)
    try:
        write_whole(new, write)
        old.touch()
        old.chmod(0o604)
        write_whole(old, write)
    finally:
        os.umask(before)
    assert [stat.S_IMODE(path.stat().st_mode) for path in (new, old)] == [0o640, 0o604]
    assert new.read_bytes() == old.read_bytes() != b""


def test_a_link_stays_and_what_it_points_to_is_written(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    target = tmp_path / "b" / "file.safetensors"
    for step in ("new", "old"):  # at first the link dangles
        path = tmp_path / "a" / "link"
        if step == "new":
            link(tmp_path / "b" / "second", "file.safetensors")
            link(path, "../b/second")
        expect_writable(path)
        write_whole(path, save_tensors)
        assert path.is_symlink() and not target.is_symlink()
        assert load_file(target)["x"].tolist() == [1, 1, 1]
    assert (left(tmp_path / "a"), left(tmp_path / "b")) == (["link"], ["file.safetensors", "second"])


NOT_WRITABLE: dict[str, tuple[Callable[[Path], Path], str]] = {
    "folder": (lambda f: f, "is a folder"),
    "link to a folder": (lambda f: link(f / "x", f), "is a folder"),
    "no folder": (lambda f: f / "no" / "x", "no folder"),
    "dangling into no folder": (lambda f: link(f / "x", f / "no" / "y"), "no folder"),
    "looping link": (lambda f: link(f / "x", f / "x"), "Too many levels"),
    "in a file": (lambda f: Path(__file__) / "x", "Not a directory"),
    "too long": (lambda f: f / ("x" * 300), "File name too long"),
    "zero byte": (lambda f: f / "a\0b", "embedded null byte"),
    "surrogate": (lambda f: f / "\ud800", "cannot be written"),
    "empty": (lambda f: Path(""), "is a folder"),
}


@pytest.mark.parametrize("name", NOT_WRITABLE)
def test_what_cannot_be_written_is_refused_before_and_after(name, tmp_path):
    make, said = NOT_WRITABLE[name]
    path = make(tmp_path)
    before = left(tmp_path)
    assert said in refusal(expect_writable, path)
    refusal(write_whole, path, content())
    assert left(tmp_path) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_no_permission(tmp_path):
    shut = tmp_path / "shut"
    shut.mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "file").chmod(0o400)
    shut.chmod(0o500)
    for path in (shut / "x", tmp_path / "file"):
        assert "no permission" in refusal(expect_writable, path)
    assert "cannot be written" in refusal(write_whole, shut / "x", content())


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ZeroDivisionError("a bug")])
def test_a_failure_half_way_leaves_the_old_file(error, tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"old")

    def write(scratch: Path) -> None:
        scratch.write_bytes(b"half")
        raise error

    with pytest.raises(UserError if isinstance(error, OSError) else ZeroDivisionError):
        write_whole(path, write)
    assert path.read_bytes() == b"old" and left(tmp_path) == ["x"]


@pytest.mark.parametrize("behind_a_link", [False, True])
def test_a_device_is_written_and_stays_a_device(behind_a_link, tmp_path):
    null, full = device(tmp_path / "null", NULL), device(tmp_path / "full", FULL)
    places = [link(tmp_path / f"to {path.name}", path) if behind_a_link else path for path in (null, full)]
    for path in places:
        expect_writable(path)
    write_whole(places[0], content(b"x" * 100_000))
    assert "No space left on device" in refusal(write_whole, places[1], content())
    assert [path.stat().st_rdev for path in (null, full)] == [NULL, FULL]
    assert len(left(tmp_path)) == (4 if behind_a_link else 2)


def test_a_fifo_gets_the_content_and_stays_a_fifo(tmp_path):
    path, received = fifo(tmp_path / "x"), []
    # Opened for both, a FIFO waits for nobody.
    handle = os.open(path, os.O_RDWR)
    reader = threading.Thread(target=lambda: received.append(path.read_bytes()))
    reader.start()
    data = b"y" * 300_000  # more than a FIFO holds at once
    write_whole(path, content(data))
    os.close(handle)
    reader.join(timeout=60)
    assert received == [data] and left(tmp_path) == ["x"]
    assert stat.S_ISFIFO(path.stat().st_mode)


def test_a_fifo_that_nobody_reads_is_refused_at_once(tmp_path):
    path = fifo(tmp_path / "x")
    expect_writable(path)  # a reader may still come
    assert refusal(write_whole, path, content()) == f"{path}: cannot be written (nobody reads it)"
    assert stat.S_ISFIFO(path.stat().st_mode)


def test_standard_output_as_a_file(tmp_path):
    code = (
        "from pathlib import Path; from minivlm.files import *\n"
        "expect_writable(Path('/dev/stdout')); write_whole(Path('/dev/stdout'), lambda p: p.write_bytes(b'through'))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=ROOT, timeout=60)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, b"through", b"")
