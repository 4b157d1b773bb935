"""The rows of samples.jsonl: one line per answered or failed sample, none of which is taken on trust."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from eval.accuracy.outcomes import Outcome
from eval.accuracy.run_settings import RunSettings
from eval.accuracy.tasks import TASKS
from minivlm.errors import UserError, printable
from minivlm.files import exists, read_bytes
from minivlm.schema import decode


@dataclass(frozen=True)
class Row:
    """A good line of the file, as it stands there, and what it says."""

    line: bytes  # with its line feed
    outcome: Outcome


@dataclass(frozen=True)
class Rows:
    """The good rows of a file in order, and its damaged lines by number, with the reason."""

    good: list[Row] = field(default_factory=list)
    damaged: dict[int, str] = field(default_factory=dict)
    torn: bool = False  # the last line is incomplete: a process was killed while it wrote


def read_rows(path: Path, problem: Callable[[Outcome], str]) -> Rows:
    """Read a samples.jsonl; a missing file has no rows.

    A line is damaged if it is not the JSON of an `Outcome`, if `problem` says why, or if its sample
    is answered already: one that failed may be asked again, and its last row counts. Raises
    `UserError` if the file cannot be read.
    """
    data = read_bytes(path) if exists(path) else b""
    *lines, rest = data.split(b"\n")
    rows = Rows(torn=bool(rest))
    answered: dict[tuple[str, tuple[str, int]], int] = {}  # by code and sample: the number of the line
    for number, line in enumerate(lines, 1):
        try:
            outcome = decode(line, Outcome, "")
        except UserError as error:
            rows.damaged[number] = printable(str(error).removeprefix(": "), 120)
            continue
        sample = outcome.code, outcome.key
        if reason := _inconsistency(outcome) or problem(outcome):
            rows.damaged[number] = printable(reason, 120)
        elif sample in answered:
            rows.damaged[number] = f"its sample is answered in line {answered[sample]}"
        else:
            rows.good.append(Row(line + b"\n", outcome))
            if outcome.answered:
                answered[sample] = number
    return rows


def misfit(outcome: Outcome, settings: RunSettings) -> str:
    """Why an outcome cannot come from a run with these settings; empty if it can."""
    if outcome.task not in settings.tasks or outcome.task not in TASKS:
        return f"unknown task {outcome.task!r}"
    if outcome.answered and (outcome.scores is None) != settings.predict_only:
        return "scores that were not asked for" if settings.predict_only else "no scores"
    unknown = (outcome.scores or {}).keys() - TASKS[outcome.task].metrics
    return f"unknown metric {min(unknown)!r}" if unknown else ""


def _inconsistency(outcome: Outcome) -> str:
    """What is wrong with a row in itself: it holds an error, or an answer with its cost."""
    if outcome.error is not None:
        return "an error and an answer" if outcome.prediction is not None or outcome.scores is not None else ""
    missing = [name for name in ("prediction", "finish", "cost") if getattr(outcome, name) is None]
    return f"no {missing[0]}" if missing else ""
