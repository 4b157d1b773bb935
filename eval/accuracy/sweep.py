"""`python -m eval sweep`: a grid of policies and KV budgets, and a picture of their accuracy.

Every cell of the grid is an ordinary run in its own folder. So an interrupted sweep continues where
it stopped, and a larger one reuses what is done. `sweep.json` holds the grid, `sweep.md` its table
and `sweep.png` the picture (if matplotlib is installed). A budget that a policy cannot meet is
recorded with the reason and does not stop the others.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from eval.accuracy.command import model_loader, parse_run, policy_settings, prepare_run
from eval.accuracy.compare import FinishedRun, comparison_table
from eval.accuracy.processes import Processes
from eval.accuracy.run_results import RunResults
from eval.accuracy.runner import NothingAnswered, evaluate
from eval.accuracy.tasks import TASKS
from eval.figures import can_draw, row_of_panels, save_figure
from eval.json_files import write_json
from minivlm.app import policy_flags
from minivlm.app.cli import Parser, note
from minivlm.cache.policies import PRESETS
from minivlm.errors import UserError, printable
from minivlm.files import exists, expect_writable, write_whole

BUDGETS = (0.75, 0.5, 0.25, 0.1, 0.05)


@dataclass(frozen=True)
class Cell:
    """A cell of a grid: the flags of one run. Cells of one `line` are joined in the picture."""

    name: str
    line: str
    flags: Sequence[str]


@dataclass(frozen=True)
class CellResult:
    """A cell with the folder and results of its run, or with the reason why it was refused."""

    cell: Cell
    folder: str = ""
    results: RunResults | None = None
    refusal: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The cell as sweep.json holds it."""
        if self.results is None:
            return {**asdict(self.cell), "refused": self.refusal}
        return {**asdict(self.cell), "folder": self.folder, **msgspec.to_builtins(self.results)}


def run_sweep(arguments: Sequence[str]) -> None:
    """Run the grid and write its files. The flags of `python -m eval` hold for all its cells."""
    parser = Parser("Runs policies at KV budgets. The other flags hold for all cells.", "python -m eval sweep")
    parser.flag("policies", nargs="+", default=list(PRESETS), help="(all)")
    parser.flag(
        "budgets",
        nargs="+",
        type=float,
        default=list(BUDGETS),
        help=f"shares of the prompt's KV bytes ({' '.join(map(str, BUDGETS))}); `full` runs once, without a budget",
    )
    args = parse_run(parser, arguments)
    files = {name: args.output_path / f"sweep.{name}" for name in ("json", "md", "png")}
    for file in filter(exists, files.values()):  # a mistake is better said before hours of work
        expect_writable(file)
    processes = Processes.join()
    try:
        cells = run_cells(grid(args.policies, args.budgets), args, processes)
        if processes.rank == 0:
            if all(cell.refusal for cell in cells):
                raise UserError(f"no cell of the sweep could be run; {cells[0].refusal}")
            text = describe_cells(cells)
            write_json(files["json"], {"cells": [cell.to_dict() for cell in cells]})
            write_whole(files["md"], lambda scratch: scratch.write_text(text, encoding="utf-8"))
            draw_scores(cells, files["png"])
            print(text + printable(str(files["json"]), 5000))
    finally:
        processes.leave()


def grid(
    policies: Sequence[str],
    budgets: Sequence[float],
    extra_flags: Sequence[str] = (),
    suffix: str = "",
) -> list[Cell]:
    """The cells of every policy at every budget, with `suffix` in their names.

    `full` runs once, without a budget.
    """
    cells = []
    for policy in policies:
        line = policy + suffix
        if policy == "full":
            cells.append(Cell(line, line, ["--policy", policy, *extra_flags]))
            continue
        for budget in budgets:
            flags = ["--policy", policy, "--kv_budget", str(budget), *extra_flags]
            cells.append(Cell(f"{line} {budget:.0%}", line, flags))
    return cells


def run_cells(cells: Sequence[Cell], args: argparse.Namespace, processes: Processes = Processes()) -> list[CellResult]:
    """Run what `args` describe once for each cell, with the cell's flags on top."""
    base, load = prepare_run(args), model_loader(args)
    parser = Parser("")
    policy_flags.add_arguments(parser, [] if args.policy_file is None else ["--policy_file", args.policy_file])
    done = []
    for cell in cells:
        if processes.rank == 0 and sys.stderr.isatty():
            print(f"{cell.name}: {' '.join(cell.flags)}", file=sys.stderr)
        try:
            cell_args = parser.parse_args(cell.flags, argparse.Namespace(**vars(args)))
            settings = policy_settings(cell_args)
        except UserError as error:
            done.append(CellResult(cell, refusal=str(error)))
            continue
        try:
            folder, results = evaluate(
                replace(base, settings=settings), args.output_path, load, processes, force=args.force
            )
            done.append(CellResult(cell, folder.name, results))
        except NothingAnswered as error:
            done.append(CellResult(cell, refusal=str(error)))
    return done


def describe_cells(cells: Sequence[CellResult], question_types: Sequence[str] = ()) -> str:
    """The cells as a Markdown table, and below it what was refused."""
    runs = [FinishedRun(cell.cell.name, cell.results, {}) for cell in cells if cell.results is not None]
    refused = [f"- {cell.cell.name} was refused: {cell.refusal}\n" for cell in cells if cell.refusal]
    table = comparison_table(runs, question_types)
    return "\n".join([table, "".join(refused)]) if refused else table


def draw_scores(cells: Sequence[CellResult], path: Path) -> bool:
    """Draw the metrics of the first scored task against the KV bytes held per page.

    A cell that answered fewer samples than others (because its budget was too small for the longest
    prompts) is left out: its score is over other questions. Returns False, with a note on stderr,
    if there is nothing to draw or matplotlib is missing.
    """
    scored = [
        (cell.cell.line, cell.results)
        for cell in cells
        if cell.results is not None and any(summary["n"] for summary in cell.results.results.values())
    ]
    if not scored:
        note("no picture, since nothing was scored")
        return False
    if not can_draw():
        return False
    first = scored[0][1]
    task = next(task for task in first.cost if first.results[task]["n"])
    most = max(results.results[task]["n"] for _, results in scored)
    scored = [(line, results) for line, results in scored if results.results[task]["n"] == most]
    summary = scored[0][1].results[task]
    metrics = [name for name in dict.fromkeys((TASKS[task].metric, "anls", "exact_match")) if name in summary]
    figure, panels = row_of_panels(len(metrics))
    for axes, metric in zip(panels, metrics, strict=True):
        _draw_metric(axes, scored, task, metric)
    panels[0].legend()
    figure.suptitle(f"{task}, n = {most}")
    save_figure(figure, path)
    return True


def _draw_metric(axes: Any, scored: Sequence[tuple[str, RunResults]], task: str, metric: str) -> None:
    """Draw one metric of a task: a curve per line, and `full` as a dashed line across."""
    full_bytes = scored[0][1].cost[task].kv_full_bytes_mean
    unit, scale = ("MiB", 2**20) if full_bytes > 2**21 else ("KiB", 2**10)
    for name in dict.fromkeys(line for line, _ in scored):
        points = sorted(
            (
                results.cost[task].kv_bytes_mean / scale,
                results.results[task][metric],
                results.results[task][f"{metric}_stderr"],
            )
            for line, results in scored
            if line == name
        )
        sizes, scores, errors = zip(*points, strict=True)
        if name == "full":
            axes.axhline(scores[0], color="0.5", linestyle="--", linewidth=1)
        axes.errorbar(sizes, scores, errors, marker="o", markersize=4, capsize=2, linewidth=1.2, label=name)
    axes.set_xlabel(f"KV cache held per page ({unit})")
    axes.set_ylabel({"anls": "ANLS"}.get(metric, metric.replace("_", " ")))
    axes.set_ylim(0, 1.02)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
