"""Data sets with damaged records: refused, or evaluated so that a bad sample fails and the others are answered."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import pyarrow
import pyarrow.parquet

from fuzzer.case import Box, Case, Expect
from fuzzer.child import Ran
from fuzzer.flags import check_runs, strict_json
from fuzzer.mutate_json import flip_bytes, junk, mutate_json
from fuzzer.world import EVAL_FLAGS, NEXT, RECORDS, run_folder

_NAMES = (
    *("", "../../wide.png", "/dev/zero", "/etc/passwd", "documents", "no.png"),
    *("n" * 300, "d/" * 2500, "a\x00b", "\ud800"),
)
_IDS = ("9" * 5000, "\ud800", "", " ", "٣", "²", "1.0", 1.5, -1, 10**25, True, "a\nb", "x" * 10_000, [1], {"a": 1})


def make_json_data(box: Box) -> Case:
    """`python -m eval` on DocVQA's JSON with one or more changes."""
    content = json.loads((box.shared / "data" / "val_v1.0.json").read_bytes())
    if box.rng.random() < 0.4:
        changed = mutate_json(content, box.rng)
        # NaN and Infinity, which Python reads, make a bad record but not a bad file.
        expect = Expect.EITHER if changed.broken and _is_read_by_python(changed.data) else changed.expect
        return data_case(box, changed.data, expect)
    for _ in range(box.rng.choice((1, 1, 2))):
        change_record(content["data"], box.rng)
    return data_case(box, json.dumps(content).encode())


def change_record(records: list[dict[str, Any]], rng: Random) -> None:
    """Damage one record, in a field that is read."""
    record = rng.choice(records)
    field = rng.choice(("image", "questionId", "question", "answers", "question_types", "data_split"))
    text = rng.choice(("\ud800", "a\x00b", "x" * 100_000, "<image><image>", "</s>", "\u202e", "line\nbreak", ""))
    answers = ([text], [text] * 3, [[]], [None], [5], [])
    values = {"image": _NAMES, "questionId": _IDS, "answers": answers}.get(
        field, (text, [text], junk(rng), junk(rng), junk(rng))
    )
    record[field] = rng.choice(values)


def data_case(box: Box, content: bytes, expect: Expect = Expect.EITHER) -> Case:
    """An evaluation of a data set that has `content` as its JSON, and the shared images."""
    box.copy("data", box.inputs / "data")
    file = box.write("data/val_v1.0.json", content)
    return evaluation(box, file.parent, expect, _questions(content))


def _is_read_by_python(content: bytes) -> bool:
    try:
        json.loads(content)
    except (ValueError, RecursionError):
        return False
    return True


def _questions(content: bytes) -> list[str] | None:
    """The questions of a data set; None if that is not clear."""
    try:
        return [record["question"] for record in json.loads(content)["data"]]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def evaluation(box: Box, data: Path, expect: Expect, questions: Sequence[str] | None) -> Case:
    """An evaluation whose results have to be complete, and those of the clean data where the records are."""
    flags = ["--model", box.shared / NEXT, "--data", data, *EVAL_FLAGS, "--output_path", box.out / "runs"]

    def check(ran: Ran) -> None:
        check_runs(box.out / "runs")
        (path,) = (box.out / "runs").glob("*/results.json")
        summary = strict_json(path)["results"]["docvqa_val"]
        if questions is not None:
            counted = summary["n"] + summary["failed"] + summary["unscored"]
            assert counted == len(questions), f"{len(questions)} records, {counted} counted"
        clean = predictions(run_folder(box.shared) / "samples.jsonl")
        ours = predictions(path.with_name("samples.jsonl"))
        untouched = _untouched(questions)
        wrong = [key for key in untouched if ours.get(key, clean[key]) not in (clean[key], None)]
        assert not wrong, f"other answers to the same questions: {wrong}"

    return Case("eval", flags, expect, outputs=[box.out / "runs"], check=check)


def _untouched(questions: Sequence[str] | None) -> list[int]:
    """Indices of the records whose question is in its place (their image may still be damaged, and then fails)."""
    asked = list(questions or [])[:RECORDS]
    return [index for index, question in enumerate(asked) if question == f"What is number {index}?"]


def predictions(path: Path) -> dict[int, str | None]:
    """The answers of a run by index; None for a sample that failed."""
    rows = map(json.loads, path.read_bytes().decode().splitlines())
    return {row["index"]: row.get("prediction") for row in rows}


def make_parquet(box: Box) -> Case:
    """`python -m eval` on a damaged parquet file, or one with odd rows."""
    rng, clean = box.rng, (box.shared / "parquet" / "validation-0.parquet").read_bytes()
    if rng.random() < 0.5:
        end = len(clean) - 400  # the description is at the end
        flipped = rng.choice((flip_bytes(clean, rng), clean[:end] + flip_bytes(clean[end:], rng)))
        return parquet_case(box, rng.choice((flipped, flipped, clean[: rng.randrange(len(clean))])))
    rows = pyarrow.parquet.read_table(io.BytesIO(clean)).to_pylist()
    row = rng.choice(rows)
    name = rng.choice(list(row))
    values: tuple[Any, ...] = (None, "", "x" * 10_000, "a\x00b", "1" * 5000)
    if name == "image":
        flipped = flip_bytes(row["image"]["bytes"], rng)
        values = (None, *({"bytes": content} for content in (None, b"", b"x" * 100, flipped)))
    elif name in ("answers", "question_types"):
        values = (None, [], [None], ["x" * 10_000])
    row[name] = rng.choice(values)
    if rng.random() < 0.2:
        for each in rows:
            each.pop(name)
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file, row_group_size=2)
    return parquet_case(box, file.getvalue())


def parquet_case(box: Box, content: bytes) -> Case:
    """An evaluation of a folder with one parquet file."""
    box.write("parquet/validation-0.parquet", content)
    return evaluation(box, box.inputs / "parquet", Expect.EITHER, None)
