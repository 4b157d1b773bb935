"""`python -m eval compare A B ...`: runs side by side, each against the first.

Two runs over the same questions are paired. The difference of their means is therefore judged by
resampling questions (Efron's percentile bootstrap, 10,000 draws from a fixed seed) rather than by
comparing two standard errors. The number of answers that differ at all is printed too; for 16-bit
runs with two batch sizes it shows how often rounding changes an answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch

from eval.accuracy.outcomes import Outcome, metrics_in
from eval.accuracy.report import figures_of
from eval.accuracy.rows import misfit, read_rows
from eval.accuracy.run_results import RunResults, decode_results
from minivlm.app.cli import Parser
from minivlm.errors import UserError, printable
from minivlm.files import exists, is_folder, read_bytes

_DRAWS = 10_000
_DRAWN_AT_ONCE = 1 << 20  # indices, a few megabytes


@dataclass(frozen=True)
class FinishedRun:
    """A finished run: its results.json, and its answered samples by (task, id)."""

    name: str
    results: RunResults
    outcomes: dict[tuple[str, int | str], Outcome]

    @classmethod
    def read(cls, path: Path) -> FinishedRun:
        """Read a run by its folder, its results.json, or an output folder without other runs.

        Raises `UserError` for anything else, for a damaged file, and for a run of another format.
        """
        files = [path] if path.name == "results.json" else [path / "results.json"]
        if not exists(files[0]):
            files = sorted(path.glob("*/results.json")) if is_folder(path) else []
        if len(files) != 1:
            contents = f"{len(files)} runs; name one of them" if files else "no results.json"
            raise UserError(f"{path}: {contents} (expected the folder of a finished run)")
        results = decode_results(read_bytes(files[0]), str(files[0]))
        by_task = _outcomes_of(results, files[0].with_name("samples.jsonl"))
        # The figures follow from the rows, and from nothing else.
        results = msgspec.structs.replace(results, **figures_of(by_task))
        answered = {(o.task, o.id): o for outcomes in by_task.values() for o in outcomes if o.answered}
        return cls(printable(files[0].parent.name), results, answered)


def _outcomes_of(results: RunResults, path: Path) -> dict[str, list[Outcome]]:
    """The outcomes that results are about, by task, from the rows in `path`.

    Raises `UserError` for a damaged row, and if there are not as many as the results say.
    """

    def problem(outcome: Outcome) -> str:
        if outcome.code != results.code:
            return f"answered by code {outcome.code}, not {results.code}"
        return misfit(outcome, results.settings)

    again = "run it again, and what is damaged is mended"
    rows = read_rows(path, problem)
    for number, reason in rows.damaged.items():
        raise UserError(f"{path}: line {number} is damaged ({reason}); {again}")
    by_task: dict[str, list[Outcome]] = {}
    for task in results.settings.tasks:
        asked = results.samples.get(task, 0)
        last = {row.outcome.index: row.outcome for row in rows.good if row.outcome.task == task}
        by_task[task] = [outcome for index, outcome in sorted(last.items()) if index < asked]
        if len(by_task[task]) != asked or not any(outcome.answered for outcome in by_task[task]):
            raise UserError(f"{path}: holds {len(by_task[task])} of the {asked} samples of {task}; {again}")
    return by_task


def compare_runs(arguments: Sequence[str]) -> None:
    """Print the table of some runs, then every run against the first."""
    parser = Parser("Puts finished runs side by side, each against the first.", "python -m eval compare")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run, or its results.json")
    first, *others = [FinishedRun.read(path) for path in parser.parse_args(arguments).runs]
    print(comparison_table([first, *others]))
    for other in others:
        print(describe_change(first, other))


def comparison_table(runs: Sequence[FinishedRun], question_types: Sequence[str] = ()) -> str:
    """A Markdown table per task: scores, also for the given question types, and the cost."""
    lines = []
    for task in dict.fromkeys(task for run in runs for task in run.results.cost):
        of_task = [run for run in runs if task in run.results.cost]
        lines += [*_task_table(task, of_task, question_types), ""]
    return "\n".join(lines)


def _task_table(task: str, runs: Sequence[FinishedRun], question_types: Sequence[str]) -> list[str]:
    metrics = list(dict.fromkeys(name for run in runs for name in metrics_in(run.results.results[task])))
    by_type = [f"{name}, {question_type}" for question_type in question_types for name in metrics]
    costs = ["KV MiB a page", "of full", "prefill ms", "decode ms/token"]
    heads = [task, "n", "failed", *metrics, *by_type, *costs]
    lines = [_table_line(heads), _table_line(["---", *["---:"] * (len(heads) - 1)])]
    for run in runs:
        summary, cost = run.results.results[task], run.results.cost[task]
        parts = [run.results.by_type[task].get(question_type, {}) for question_type in question_types]
        scores = [
            f"{part[name]:.4f} ± {part[name + '_stderr']:.4f}" if name in part else ""
            for part in [summary, *parts]
            for name in metrics
        ]
        costs = [
            f"{cost.kv_bytes_mean / 2**20:.3f}",
            f"{cost.kv_share:.1%}",
            f"{cost.prefill_ms:.1f}",
            f"{cost.decode_ms_per_token:.2f}",
        ]
        lines.append(_table_line([run.name, summary["n"], summary["failed"], *scores, *costs]))
    return lines


def _table_line(cells: Sequence[object]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def describe_change(first: FinishedRun, other: FinishedRun) -> str:
    """How `other` differs from `first` in settings and, for each task, in answers and scores."""
    changes = _changed_settings(*(msgspec.to_builtins(run.results.settings) for run in (first, other)))
    if first.results.code != other.results.code:
        changes.append(f"answered by other code: {first.results.code} → {other.results.code}")
    lines = [f"{other.name} against {first.name} ({', '.join(changes) or 'the same settings'}):"]
    pairs = [(outcome, other.outcomes[key]) for key, outcome in first.outcomes.items() if key in other.outcomes]
    for task in dict.fromkeys(outcome.task for outcome, _ in pairs):
        in_task = [(a, b) for a, b in pairs if a.task == task]
        changed = sum(a.prediction != b.prediction for a, b in in_task)
        share = changed / len(in_task)
        lines.append(f"  {task}: {len(in_task)} samples in both, {changed} answers differ ({share:.1%})")
        for metric in metrics_in(first.results.results[task]):
            if differences := paired_differences(first, other, task, metric):
                lines.append(f"    {metric} {describe_differences(differences)}")
    if not pairs:
        lines.append("  no sample in both")
    return "\n".join(lines)


def paired_differences(first: FinishedRun, other: FinishedRun, task: str, metric: str) -> list[float]:
    """`other` minus `first` in a metric, for every sample of a task that both have scored."""
    pairs = [
        (outcome.scores or {}, other.outcomes[key].scores or {})
        for key, outcome in first.outcomes.items()
        if key in other.outcomes and key[0] == task
    ]
    return [after[metric] - before[metric] for before, after in pairs if metric in before and metric in after]


def describe_differences(differences: Sequence[float]) -> str:
    """The mean of paired differences, its interval, and how often each side did better."""
    low, high = paired_bootstrap(differences)
    better = sum(difference > 0 for difference in differences)
    worse = sum(difference < 0 for difference in differences)
    return (
        f"{sum(differences) / len(differences):+.4f}, 95 % interval {low:+.4f} … {high:+.4f}; "
        f"better on {better}, worse on {worse}, equal on {len(differences) - better - worse}"
    )


def paired_bootstrap(differences: Sequence[float], level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """The interval that holds the mean of resampled `differences` in a share `level` of the draws.

    Raises ValueError if there are no differences.
    """
    if not differences:
        raise ValueError("no differences to resample")
    generator = torch.Generator().manual_seed(seed)
    values = torch.tensor(differences, dtype=torch.float64)
    at_once = max(1, _DRAWN_AT_ONCE // len(values))
    means = []
    for start in range(0, _DRAWS, at_once):
        shape = (min(at_once, _DRAWS - start), len(values))
        means.append(values[torch.randint(len(values), shape, generator=generator)].mean(1))
    tail = (1 - level) / 2
    low, high = torch.cat(means).quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high


def _changed_settings(first: Any, other: Any, name: str = "") -> list[str]:
    """Every setting in which two runs differ, as "name: old → new"."""
    if isinstance(first, dict) and isinstance(other, dict):
        keys = dict.fromkeys((*first, *other))
        return [change for key in keys for change in _changed_settings(first.get(key), other.get(key), key)]
    return [] if first == other else [f"{name}: {first} → {other}"]
