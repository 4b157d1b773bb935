"""Names of files that are none, in the place of every input and output: FIFOs, devices, folders, loops, odd names."""

from __future__ import annotations

import json
import os
import socket
import stat
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from fuzzer.case import Box, Case, Expect
from fuzzer.checkpoints import JSON_FILES, link_checkpoint
from fuzzer.child import Ran
from fuzzer.data import data_case
from fuzzer.world import LLAVA, NEXT, QUESTION, eval_flags, run_folder

# Makers of names. Each gets the place where the name should be and returns the name to pass on.


def fifo(path: Path) -> Path:
    os.mkfifo(path)
    return path


def folder(path: Path) -> Path:
    path.mkdir()
    return path


def missing(path: Path) -> Path:
    return path


def dangling(path: Path) -> Path:
    path.symlink_to(path.with_name("nowhere") / "nothing")
    return path


def loop(path: Path) -> Path:
    path.symlink_to(path.name)
    return path


def zero_link(path: Path) -> Path:
    path.symlink_to("/dev/zero")
    return path


def link(path: Path) -> Path:
    """A link to a file that is there."""
    path.with_name("file").write_bytes(b"old")
    path.symlink_to("file")
    return path


def null_device(path: Path) -> Path:
    return device(path, 3)


def zero_device(path: Path) -> Path:
    return device(path, 5)


def device(path: Path, minor: int) -> Path:
    """A device node in the case's own folder; where that is not permitted, a FIFO."""
    try:
        os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, minor))
    except PermissionError:
        os.mkfifo(path)
    return path


def unix_socket(path: Path) -> Path:
    with socket.socket(socket.AF_UNIX) as made:
        here = os.getcwd()
        os.chdir(path.parent)  # the name of a socket may not be long
        made.bind(path.name)
        os.chdir(here)
    return path


def long_name(path: Path) -> Path:
    return path.with_name("n" * 300)


def long_path(path: Path) -> Path:
    return path.joinpath(*["d" * 100] * 50)


def below_a_file(path: Path) -> Path:
    path.write_bytes(b"")
    return path / "name"


def no_text(path: Path) -> bytes:
    return os.fsencode(path.parent) + b"/\xff\xfe"


def empty(path: Path) -> str:
    return ""


def line_break(path: Path) -> Path:
    return path.with_name("a\nb\rc\x1b[2J")


Name = Path | bytes | str
NO_FILES: tuple[Callable[[Path], Name], ...] = (
    *(fifo, folder, missing, dangling, loop, zero_link, null_device, zero_device, unix_socket),
    *(long_name, long_path, below_a_file, no_text, empty, line_break),
)

WAITING = (fifo, zero_link, zero_device, long_name)  # to read these takes for ever, or was a traceback
# A case must not write to a device of the machine.
ODD_TARGETS = (*(make for make in NO_FILES if make not in (zero_link, zero_device)), link)


OTHER_FILES = (
    (NEXT, "model.safetensors"),
    (LLAVA, "chat_template.jinja"),
    (LLAVA, "model-00002-of-00002.safetensors"),
)


@dataclass(frozen=True)
class Place:
    """Where a name goes: a case with it. `file` says which name it should have, among the inputs or outputs."""

    file: str
    case: Callable[[Box, Name], Case]


def _generate(box: Box, *more: object, model: object = None, image: object = None) -> list[object]:
    model = box.shared / NEXT if model is None else model
    image = box.shared / "wide.png" if image is None else image
    return ["--model", model, "--image", image, "--prompt", QUESTION, "--max_new_tokens", 2, *more]


def _trace(box: Box, flag: str, name: Name) -> Case:
    files: dict[str, object] = {"--inputs": box.shared / "inputs.safetensors", "--out": box.out / "t.safetensors"}
    words = [word for pair in {**files, flag: name}.items() for word in pair]
    return Case("trace.py", ["--model", box.shared / NEXT, *words, "--steps", 2], Expect.REFUSAL)


def _stats(box: Box, flag: str, name: Name) -> Case:
    files: dict[str, object] = {"--image": box.shared / "wide.png", "--json": box.out / "s.json"}
    words = [word for pair in {**files, flag: name}.items() for word in pair]
    return Case("attention_stats.py", ["--model", box.shared / NEXT, "--prompt", QUESTION, *words], Expect.REFUSAL)


def _benchmark(box: Box, flag: str, name: Name) -> Case:
    flags = ["--shape", box.shared / NEXT, "--no_compile", "--vision_tokens", 8, "--new_tokens", 1]
    return Case("benchmark.py", [*flags, flag, name], Expect.REFUSAL)


def _in_checkpoint(model: str, file: str) -> Place:
    """A file of a checkpoint."""
    return Place(f"{model}/{file}", lambda box, name: Case("generate.py", _generate(box, model=box.inputs / model)))


def _eval(box: Box, *more: object) -> Case:
    return Case("eval", [*eval_flags(box.shared), "--output_path", box.out / "runs", *more], Expect.REFUSAL)


# By what a user would call them.
INPUTS: dict[str, Place] = {
    "--image": Place("page.png", lambda box, name: Case("generate.py", _generate(box, image=name), Expect.REFUSAL)),
    "--model": Place("model", lambda box, name: Case("generate.py", _generate(box, model=name or "x"), Expect.REFUSAL)),
    "--policy_file": Place(
        "p.py", lambda box, name: Case("generate.py", _generate(box, "--policy_file", name), Expect.REFUSAL)
    ),
    "--inputs": Place("i.safetensors", lambda box, name: _trace(box, "--inputs", name)),
    "--teacher_forcing": Place("t.safetensors", lambda box, name: _trace(box, "--teacher_forcing", name)),
    "attention_stats.py --image": Place("page.png", lambda box, name: _stats(box, "--image", name)),
    "--shape": Place("shape", lambda box, name: _benchmark(box, "--shape", name)),
    "a saved cache": Place("cache", lambda box, name: Case("load_cache", [box.shared / NEXT, name], Expect.REFUSAL)),
    "--data": Place("data", lambda box, name: _eval(box, "--data", name)),
    "eval --model": Place("model", lambda box, name: _eval(box, "--model", name)),
    "a run": Place("run", lambda box, name: Case("eval", ["compare", run_folder(box.shared), name], Expect.REFUSAL)),
    **{f"{model}/{file}": _in_checkpoint(model, file) for model, files in JSON_FILES.items() for file in files},
    **{f"{model}/{file}": _in_checkpoint(model, file) for model, file in OTHER_FILES},
}
OUTPUTS: dict[str, Place] = {
    "--overlay": Place("o.png", lambda box, name: Case("generate.py", _generate(box, "--overlay", name))),
    "--out": Place("t.safetensors", lambda box, name: _trace(box, "--out", name)),
    "attention_stats.py --json": Place("s.json", lambda box, name: _stats(box, "--json", name)),
    "attention_stats.py --plot": Place("s.png", lambda box, name: _stats(box, "--plot", name)),
    "benchmark.py --json": Place("b.json", lambda box, name: _benchmark(box, "--json", name)),
    "--output_path": Place("runs", lambda box, name: _eval(box, "--output_path", name)),
}


def make_path(box: Box) -> Case:
    """Some name that is no file, in some place; or an image that a data set names."""
    kind = box.rng.random()
    if kind < 0.6:
        return input_case(box, box.rng.choice(list(INPUTS)), box.rng.choice(NO_FILES))
    if kind < 0.9:
        return output_case(box, box.rng.choice(list(OUTPUTS)), box.rng.choice(ODD_TARGETS))
    return image_of_a_record(box, box.rng.choice(NO_FILES))


def input_case(box: Box, label: str, make: Callable[[Path], Name]) -> Case:
    """A name that is no file in one of the places of `INPUTS`."""
    place = INPUTS[label]
    for model in (NEXT, LLAVA):
        if place.file.startswith(f"{model}/"):
            link_checkpoint(box, model)
            (box.inputs / place.file).unlink()
    return place.case(box, make(box.inputs / place.file))


def output_case(box: Box, label: str, make: Callable[[Path], Name]) -> Case:
    """A name in one of the places of `OUTPUTS`. New names are written; so are devices, and files through links."""
    place = OUTPUTS[label]
    path = box.out / place.file
    name = make(path)
    case = place.case(box, name)
    before = _kind(path)

    def check(ran: Ran) -> None:
        assert before in (None, stat.S_IFLNK) or _kind(path) == before, "what was no file was replaced"
        assert not path.is_symlink() or before == stat.S_IFLNK, "a link was made"

    outputs = [box.root if name == "" else box.out]  # the empty name of a folder is the current one
    return replace(case, expect=Expect.EITHER, outputs=outputs, check=check, answers_first=make is fifo)


def _kind(path: Path) -> int | None:
    return stat.S_IFMT(path.lstat().st_mode) if os.path.lexists(path) else None


def image_of_a_record(box: Box, make: Callable[[Path], Name]) -> Case:
    """A data set in which one record's image is no file: this sample fails, the others are answered."""
    content = json.loads((box.shared / "data" / "val_v1.0.json").read_bytes())
    name = make(box.inputs / "page")
    content["data"][1]["image"] = os.fsdecode(name)
    return data_case(box, json.dumps(content).encode())
