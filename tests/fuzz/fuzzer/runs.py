"""Damaged folders of runs: a run goes on and ends in the results of a clean one, or is refused; so is comparing it."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

from fuzzer.case import Box, Case, Expect
from fuzzer.checkpoints import some_answer
from fuzzer.child import Ran
from fuzzer.data import predictions
from fuzzer.flags import strict_json
from fuzzer.mutate_json import JUNK, flip_bytes, mutate_json
from fuzzer.world import eval_flags, run_folder

_TIMES = ("seconds", "processes", "versions", "cost", "notes")  # of results.json: they differ from run to run


def make_run(box: Box) -> Case:
    """Damage one file of a run, then go on with the run or compare it."""
    name = box.rng.choice(("samples.jsonl", "samples.jsonl", "samples.jsonl", "results.json", "settings.json"))
    content = (run_folder(box.shared) / name).read_bytes()
    if name.endswith("l"):
        damaged = damage_rows(content, box.rng)
    else:
        damaged = mutate_json(json.loads(content), box.rng).data
    if box.rng.random() < 0.3:
        return compare_case(box, {name: damaged})
    return continued_case(box, {name: damaged})


def damage_rows(content: bytes, rng: Random) -> bytes:
    """Rows that are damaged, missing, repeated, in another order, from nowhere, or cut off."""
    lines = content.splitlines(keepends=True)
    place = rng.randrange(len(lines))
    kind = rng.randrange(8)
    if kind == 0:
        return content[: rng.randrange(len(content))]
    if kind == 1:
        lines[place] = flip_bytes(lines[place][:-1], rng) + b"\n"
    elif kind == 2:
        lines[place] = mutate_json(json.loads(lines[place]), rng).data.replace(b"\n", b" ") + b"\n"
    elif kind == 3:
        lines.insert(place, rng.choice((b"\n", b"{}\n", b"[]\n", b"5\n", b"null\n", b"\x00\n", b"\xff\n", lines[0])))
    elif kind == 4:
        rng.shuffle(lines)
    elif kind == 5:
        del lines[place]
    else:
        row = json.loads(lines[place])
        row[rng.choice(list(row))] = rng.choice(JUNK)
        lines[place] = json.dumps(row).encode() + b"\n"
    return b"".join(lines)


def continued_case(box: Box, files: dict[str, bytes | None], expect: Expect = Expect.EITHER) -> Case:
    """The clean evaluation once more, in its folder in which `files` have other content (or, for None, are missing)."""
    folder = _damaged(box, files)
    arguments = [*eval_flags(box.shared), "--output_path", box.out / "runs"]
    outputs = [folder, box.out / "runs"]
    return Case("eval", arguments, expect, outputs=outputs, check=lambda ran: _check(folder, run_folder(box.shared)))


def compare_case(box: Box, files: dict[str, bytes | None], expect: Expect = Expect.EITHER) -> Case:
    """A damaged run compared with a clean one, or the other way round."""
    names = [_damaged(box, files), run_folder(box.shared, "streaming")]
    box.rng.shuffle(names)
    return Case("eval", ["compare", *names], expect, check=some_answer)


def _damaged(box: Box, files: dict[str, bytes | None]) -> Path:
    clean = run_folder(box.shared)
    folder = box.copy(f"runs/{clean.name}", box.out / "runs" / clean.name)
    for name, content in files.items():
        (folder / name).unlink()
        if content is not None:
            (folder / name).write_bytes(content)
    return folder


def _check(folder: Path, clean: Path) -> None:
    """The folder has the answers and the scores of the clean run."""
    (folder,) = (path.parent for path in folder.parent.glob("*/results.json"))
    ours, theirs = _without_times(folder), _without_times(clean)
    assert ours == theirs, f"other results: {[name for name in theirs if ours.get(name) != theirs[name]]}"
    answers = predictions(folder / "samples.jsonl"), predictions(clean / "samples.jsonl")
    assert answers[0] == answers[1], f"other answers: {answers}"


def _without_times(folder: Path) -> dict[str, Any]:
    results = strict_json(folder / "results.json")
    return {name: value for name, value in results.items() if name not in _TIMES}
