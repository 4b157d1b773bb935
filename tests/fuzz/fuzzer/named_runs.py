"""Named cases: data sets with one bad record, and damaged folders of runs."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from fuzzer import data, flags, runs
from fuzzer.case import Box, Case, Expect
from fuzzer.child import Ran
from fuzzer.registry import named
from fuzzer.world import RECORDS, run_folder

# One bad record


@named("a record's image", "n" * 300, "d/" * 2500, "a\0b", "\ud800", "", "documents", "/etc/passwd", "../../wide.png")
def _(box: Box, name: str) -> Case:
    return _one_bad_record(box, image=name)


@named("a record's id", "9" * 5000, "\ud800", "²", 10**25)
def _(box: Box, value: object) -> Case:
    return _one_bad_record(box, failed=(0, 1), questionId=value)


@named("a record's answer", "\ud800", "9" * 5000, "a\0b")
def _(box: Box, value: str) -> Case:
    return _one_bad_record(box, failed=(0, 1), answers=[value])


@named("a record's question", "\ud800", "<image>" * 3, "x" * 100_000)
def _(box: Box, value: str) -> Case:
    return _one_bad_record(box, question=value)


@named("the first record's question", "\ud800", "<image>" * 3, "x" * 100_000)
def _(box: Box, value: str) -> Case:
    return _one_bad_record(box, index=0, question=value)


def _one_bad_record(box: Box, failed: tuple[int, ...] = (1,), index: int = 1, **fields: object) -> Case:
    """The others are answered; the bad one fails, or, where `failed` says so, is answered too."""
    content = json.loads((box.shared / "data" / "val_v1.0.json").read_bytes())
    content["data"][index].update(fields)
    case = data.data_case(box, json.dumps(content).encode(), Expect.ANSWER)

    def check(ran: Ran) -> None:
        case.check(ran)
        (path,) = (box.out / "runs").glob("*/results.json")
        summary = flags.strict_json(path)["results"]["docvqa_val"]
        assert summary["failed"] in failed and summary["n"] + summary["failed"] == RECORDS, summary

    return replace(case, expect=Expect.ANSWER, check=check)


# Run folders

ROWS: tuple[dict[str, Any], ...] = (
    *({"prediction": 5}, {"prediction": None}, {"finish": 5}, {"error": 5}),
    *({"scores": []}, {"scores": {}}, {"scores": {"anls": "x"}}, {"scores": {"anls": 1e400}}),
    *({"cost": []}, {"cost": {}}, {"cost": {"kv_bytes": "x"}}, {"types": 5}, {"types": [[]]}),
    *({"index": "0"}, {"index": -1}, {"index": 10**25}, {"task": []}, {"task": "x"}, {"id": []}),
)


@named("a row with", *map(json.dumps, ROWS))
def _(box: Box, fields: str) -> Case:
    lines = (run_folder(box.shared) / "samples.jsonl").read_bytes().splitlines(keepends=True)
    lines[1] = json.dumps({**json.loads(lines[1]), **json.loads(fields)}).encode() + b"\n"
    return runs.continued_case(box, {"samples.jsonl": b"".join(lines)}, Expect.ANSWER)


@named("a line", "5", "[]", "null", "{}", "", "{", "\0", '{"task": 5}', f'{{"index": {"9" * 5000}}}', "[" * 100_000)
def _(box: Box, line: str) -> Case:
    rows = (run_folder(box.shared) / "samples.jsonl").read_bytes()
    return runs.continued_case(box, {"samples.jsonl": line.encode() + b"\n" + rows}, Expect.ANSWER)


RESULTS = ("5", "[]", "{}", "", '{"settings": 5}', '{"settings": {"format": 2}, "results": []}', "[" * 100_000)


@named("results", *RESULTS)
def _(box: Box, content: str) -> Case:
    return runs.continued_case(box, {"results.json": content.encode()}, Expect.ANSWER)


@named("to compare", *RESULTS)
def _(box: Box, content: str) -> Case:
    return runs.compare_case(box, {"results.json": content.encode()}, Expect.REFUSAL)


@named("settings", "5", "[]", "{", "", '{"format": []}', "[" * 100_000)
def _(box: Box, content: str) -> Case:
    return runs.continued_case(box, {"settings.json": content.encode()})


@named("a finished run says that nothing is left to do")
def _(box: Box) -> Case:
    case = runs.continued_case(box, {}, Expect.ANSWER)

    def check(ran: Ran) -> None:
        case.check(ran)
        assert f"{RECORDS} of {RECORDS} already answered" in ran.err

    return replace(case, expect=Expect.ANSWER, check=check)


@named("a refused evaluation leaves no folder", "--device=cuda:7", "--policy=avl --kv_budget=0.0001", "--batch_size=0")
def _(box: Box, words: str) -> Case:
    return flags.with_words(box, flags.EVAL, *words.split(), expect=Expect.REFUSAL)
