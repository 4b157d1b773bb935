"""Damaged folders of runs: a run goes on and ends in the results of a clean one, or is refused; so is comparing it."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from random import Random
from typing import Any

from fuzzer.case import Box, Case, Expect
from fuzzer.checkpoints import some_answer
from fuzzer.data import predictions
from fuzzer.flags import strict_json
from fuzzer.mutate_json import flip_bytes, junk, mutate_json
from fuzzer.world import eval_flags, run_folder

# Of results.json, what differs from run to run, and what is only repeated from an earlier results.json.
_CIRCUMSTANCES = ("code", "seconds", "processes", "versions", "cost", "notes", "prompts", "template")


def make_run(box: Box) -> Case:
    """Damage one file of a run, then go on with the run or compare it."""
    name = box.rng.choice(("samples.jsonl", "samples.jsonl", "samples.jsonl", "results.json", "settings.json"))
    content = (run_folder(box.shared) / name).read_bytes()
    is_rows = name == "samples.jsonl"
    damaged = damage_rows(content, box.rng) if is_rows else mutate_json(json.loads(content), box.rng).data
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
        row[rng.choice(list(row))] = junk(rng)
        lines[place] = json.dumps(row).encode() + b"\n"
    return b"".join(lines)


def continued_case(box: Box, files: dict[str, bytes | None], expect: Expect = Expect.EITHER) -> Case:
    """The clean evaluation once more, in its folder in which `files` have other content (or, for None, are missing)."""
    folder = _damaged(box, files)
    arguments = [*eval_flags(box.shared), "--output_path", box.out / "runs"]
    own = _own_predictions(files.get("samples.jsonl"))
    clean = run_folder(box.shared)
    return Case("eval", arguments, expect, outputs=[box.out / "runs"], check=lambda ran: _check(folder, clean, own))


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


def _own_predictions(rows: bytes | None) -> set[tuple[object, str]]:
    """The answers that damaged rows still state, by index: what reads like a row cannot be told from one."""
    found: set[tuple[object, str]] = set()
    for line in (rows or b"").split(b"\n"):
        with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError, RecursionError):
            row = json.loads(line)
            found.add((row["index"], row["prediction"]))
    return found


def _check(folder: Path, clean: Path, own: set[tuple[object, str]]) -> None:
    """The folder has the answers of the clean run or of its own rows; with all of the clean ones, also its scores."""
    (folder,) = (path.parent for path in folder.parent.glob("*/results.json"))
    ours, theirs = predictions(folder / "samples.jsonl"), predictions(clean / "samples.jsonl")
    assert ours.keys() == theirs.keys(), f"answers of {sorted(ours)}"
    foreign = {index: text for index, text in ours.items() if text != theirs[index] and (index, text) not in own}
    assert not foreign, f"other answers: {foreign}"
    if ours == theirs:
        results, expected = _stable(folder), _stable(clean)
        differing = [name for name in expected if results.get(name) != expected[name]]
        assert not differing, f"other results: {differing}"


def _stable(folder: Path) -> dict[str, Any]:
    results = strict_json(folder / "results.json")
    return {name: value for name, value in results.items() if name not in _CIRCUMSTANCES}
