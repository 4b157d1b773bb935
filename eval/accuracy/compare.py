"""`python -m eval compare A B …`: runs side by side, and each against the first, sample by sample.

Two runs over the same questions are paired, so the difference of their means is judged by resampling questions
(Efron's percentile bootstrap, 10,000 draws from a fixed seed), not by comparing two standard errors. How many answers
differ at all is printed too: for 16-bit runs of two batch sizes that is the rate of flips.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from eval.accuracy.results import read_json, read_rows
from minivlm.app.cli import Parser
from minivlm.errors import UserError

_DRAWS = 10_000


@dataclass(frozen=True)
class Finished:
    """A finished run as it lies on disk: its results.json, and its answered rows by (task, id)."""

    name: str
    results: dict
    rows: dict[tuple[str, Any], dict]

    @classmethod
    def read(cls, path: Path) -> Finished:
        """From a run's folder, its results.json, or an output folder that holds one run; raises `UserError`."""
        found = [path] if path.name == "results.json" else [path / "results.json"]
        if not found[0].is_file():
            found = sorted(path.glob("*/results.json"))
        if len(found) != 1:
            held = f"{len(found)} runs; name one of them" if found else "no results.json"
            raise UserError(f"{path}: {held} (expected the folder of a finished run)")
        rows = {(row["task"], row["id"]): row for row in read_rows(found[0].with_name("samples.jsonl"))}
        answered = {key: row for key, row in rows.items() if "error" not in row}
        return cls(found[0].parent.name, read_json(found[0]), answered)


def paired_bootstrap(differences: Sequence[float], level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """The interval that holds the mean of `differences` in `level` of the resamples. Raises ValueError for none."""
    if not differences:
        raise ValueError("no differences to resample")
    generator = torch.Generator().manual_seed(seed)
    values = torch.tensor(differences, dtype=torch.float64)
    size = max(1, (1 << 20) // len(values))  # draws at once: a few megabytes of indices
    means = [
        values[torch.randint(len(values), (min(size, _DRAWS - start), len(values)), generator=generator)].mean(1)
        for start in range(0, _DRAWS, size)
    ]
    tail = (1 - level) / 2
    low, high = torch.cat(means).quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high


def table(runs: Sequence[Finished], kinds: Sequence[str] = ()) -> str:
    """A Markdown table for each task: metrics with standard errors, also by the given question types, and the cost."""
    lines = []
    for task in dict.fromkeys(task for run in runs for task in run.results["cost"]):
        there = [run for run in runs if task in run.results["cost"]]
        metrics = list(dict.fromkeys(name for run in there for name in _metrics(run.results["results"][task])))
        heads = [
            task,
            "n",
            "failed",
            *metrics,
            *(f"{name}, {kind}" for kind in kinds for name in metrics),
            "KV MiB a page",
            "of full",
            "prefill ms",
            "decode ms/token",
        ]
        lines += [_row(heads), _row(["---", *["---:"] * (len(heads) - 1)])]
        for run in there:
            numbers, spent = run.results["results"][task], run.results["cost"][task]
            parts = [run.results["by_type"][task].get(kind, {}) for kind in kinds]
            scores = [
                f"{part[name]:.4f} ± {part[name + '_stderr']:.4f}" if name in part else ""
                for part in [numbers, *parts]
                for name in metrics
            ]
            lines.append(
                _row(
                    [
                        run.name,
                        numbers["n"],
                        numbers["failed"],
                        *scores,
                        f"{spent['kv_bytes_mean'] / 2**20:.3f}",
                        f"{spent['kv_share']:.1%}",
                        f"{spent['prefill_ms']:.1f}",
                        f"{spent['decode_ms_per_token']:.2f}",
                    ]
                )
            )
        lines.append("")
    return "\n".join(lines)


def differences(first: Finished, other: Finished, task: str, metric: str) -> list[float]:
    """Other minus first in a metric, for every sample of a task that both have scored."""
    pairs = [
        (first.rows[key].get("scores", {}), other.rows[key].get("scores", {}))
        for key in first.rows
        if key in other.rows and key[0] == task
    ]
    return [theirs[metric] - ours[metric] for ours, theirs in pairs if metric in ours and metric in theirs]


def in_words(found: Sequence[float]) -> str:
    """The mean of paired differences, its interval, and how often each side won."""
    low, high = paired_bootstrap(found)
    wins, losses = sum(d > 0 for d in found), sum(d < 0 for d in found)
    return (
        f"{sum(found) / len(found):+.4f}, 95 % interval {low:+.4f} … {high:+.4f}; "
        f"better on {wins}, worse on {losses}, equal on {len(found) - wins - losses}"
    )


def against(first: Finished, other: Finished) -> str:
    """What differs in the settings, and per task and metric the difference, its interval, and who won how often."""
    settings = ", ".join(_changes(first.results["settings"], other.results["settings"])) or "the same settings"
    lines = [f"{other.name} against {first.name} ({settings}):"]
    shared = [(first.rows[key], other.rows[key]) for key in first.rows if key in other.rows]
    for task in dict.fromkeys(row["task"] for row, _ in shared):
        pairs = [(a, b) for a, b in shared if a["task"] == task]
        flips = sum(a["prediction"] != b["prediction"] for a, b in pairs)
        lines.append(f"  {task}: {len(pairs)} samples in both, {flips} answers differ ({flips / len(pairs):.1%})")
        for metric in _metrics(first.results["results"][task]):
            if found := differences(first, other, task, metric):
                lines.append(f"    {metric} {in_words(found)}")
    if not shared:
        lines.append("  no sample in both")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> None:
    """Prints the table, then every run against the first."""
    parser = Parser("Puts finished runs side by side, each against the first.", "python -m eval compare")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run, or its results.json")
    runs = [Finished.read(path) for path in parser.parse_args(arguments).runs]
    print("\n".join([table(runs), *(against(runs[0], other) for other in runs[1:])]))


def _changes(first: Any, other: Any, name: str = "") -> list[str]:
    """Every setting in which two runs differ, as "name: old → new"."""
    if isinstance(first, dict) and isinstance(other, dict):
        keys = dict.fromkeys((*first, *other))
        return [change for key in keys for change in _changes(first.get(key), other.get(key), key)]
    return [] if first == other else [f"{name}: {first} → {other}"]


def _metrics(numbers: dict) -> list[str]:
    return [name for name in numbers if f"{name}_stderr" in numbers]


def _row(cells: Sequence[object]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"
