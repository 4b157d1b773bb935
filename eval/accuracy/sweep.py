"""`python -m eval sweep`: a grid of policies and KV budgets, and accuracy drawn against the bytes they hold.

Every cell is an ordinary run in its own folder, so an interrupted sweep goes on where it was and a wider one takes
over what is done. `sweep.json` holds the grid, `sweep.md` its table, `sweep.png` the picture (matplotlib). A budget
that a policy cannot meet is recorded with its reason and does not stop the others.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from eval.accuracy import command
from eval.accuracy.compare import Finished, table
from eval.accuracy.processes import Processes
from eval.accuracy.results import write_json
from eval.accuracy.runner import NothingAnswered, evaluate
from eval.accuracy.tasks import TASKS
from minivlm.app import policy_flags
from minivlm.app.cli import Parser, note
from minivlm.cache.settings import REGISTRY
from minivlm.errors import UserError
from minivlm.files import write_whole

BUDGETS = (0.75, 0.5, 0.25, 0.1, 0.05)


def grid(policies: Sequence[str], budgets: Sequence[float], more: Sequence[str] = (), note: str = "") -> list[dict]:
    """Cells to run: a name, the line of the picture it lies on, and its flags. `full` has no budget and runs once."""
    cells = []
    for policy in policies:
        for budget in [None] if policy == "full" else budgets:
            share = [] if budget is None else ["--kv_budget", str(budget)]
            name = policy + note + ("" if budget is None else f" {budget:.0%}")
            cells.append({"name": name, "line": policy + note, "flags": ["--policy", policy, *share, *more]})
    return cells


def run_cells(cells: Sequence[dict], args: argparse.Namespace, processes: Processes = Processes()) -> list[dict]:
    """The run that `args` describe, once with each cell's flags on top -> the cells with the content of their
    results.json, or with the reason why one was `refused`."""
    base, load = command.prepare(args), command.loader(args)
    parser = Parser("")
    policy_flags.add_arguments(parser)
    done = []
    for cell in cells:
        if processes.rank == 0:
            print(f"{cell['name']}: {' '.join(cell['flags'])}", file=sys.stderr)
        try:
            settings = policy_flags.from_args(
                parser.parse_args(cell["flags"], argparse.Namespace(**vars(args))), args.seed
            )
        except UserError as error:
            done.append({**cell, "refused": str(error)})
            continue
        try:
            folder, results = evaluate(replace(base, settings=settings), args.output_path, load, processes)
            done.append({**cell, "folder": folder.name, **results})
        except NothingAnswered as error:
            done.append({**cell, "refused": str(error)})
    return done


def describe(cells: Sequence[dict], kinds: Sequence[str] = ()) -> str:
    """The cells as a Markdown table (with the scores of some question types), and what was refused below it."""
    text = table([Finished(cell["name"], cell, {}) for cell in cells if "refused" not in cell], kinds)
    refused = [f"- {cell['name']} was refused: {cell['refused']}\n" for cell in cells if "refused" in cell]
    return "\n".join([text, "".join(refused)]) if refused else text


def draw(cells: Sequence[dict], path: Path) -> bool:
    """Draws the metrics of the first scored task against the KV bytes a page holds, with standard errors.

    A cell that answered fewer samples than others (a budget too small for the longest prompts) is left out: its score
    is over other questions. False, with a note on stderr, where there is nothing to draw or to draw with.
    """
    cells = [cell for cell in cells if any(numbers["n"] for numbers in cell.get("results", {}).values())]
    if not cells:
        note("no picture, since nothing was scored")
        return False
    if find_spec("matplotlib") is None:
        note("no picture without matplotlib (pip install 'minivlm[plots]')")
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    task = next(task for task in cells[0]["cost"] if cells[0]["results"][task]["n"])
    most = max(cell["results"][task]["n"] for cell in cells)
    cells = [cell for cell in cells if cell["results"][task]["n"] == most]
    metrics = [
        name for name in dict.fromkeys((TASKS[task].metric, "anls", "exact_match")) if name in cells[0]["results"][task]
    ]
    unit, scale = ("MiB", 2**20) if cells[0]["cost"][task]["kv_full_bytes_mean"] > 2**21 else ("KiB", 2**10)
    figure = Figure(figsize=(5.5 * len(metrics), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, metric in zip(figure.subplots(1, len(metrics), squeeze=False)[0], metrics):
        for name in dict.fromkeys(cell["line"] for cell in cells):
            held, scores, errors = zip(
                *sorted(
                    (
                        cell["cost"][task]["kv_bytes_mean"] / scale,
                        cell["results"][task][metric],
                        cell["results"][task][f"{metric}_stderr"],
                    )
                    for cell in cells
                    if cell["line"] == name
                )
            )
            if name == "full":
                axes.axhline(scores[0], color="0.5", linestyle="--", linewidth=1)
            axes.errorbar(held, scores, errors, marker="o", markersize=4, capsize=2, linewidth=1.2, label=name)
        axes.set_xlabel(f"KV cache held per page ({unit})")
        axes.set_ylabel({"anls": "ANLS"}.get(metric, metric.replace("_", " ")))
        axes.set_ylim(0, 1.02)
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
    figure.axes[0].legend()
    figure.suptitle(f"{task}, n = {most}")
    write_whole(path, lambda scratch: figure.savefig(scratch, dpi=150))
    return True


def main(arguments: Sequence[str]) -> None:
    """Runs the grid; the flags of `python -m eval` hold for all its cells."""
    parser = Parser("Runs policies at KV budgets; the other flags hold for all cells.", "python -m eval sweep")
    parser.flag("policies", nargs="+", default=list(REGISTRY), help="(all)")
    parser.flag(
        "budgets",
        nargs="+",
        type=float,
        default=list(BUDGETS),
        help=f"shares of the prompt's KV bytes ({' '.join(map(str, BUDGETS))}); `full` runs once, without one",
    )
    command.add_arguments(parser)
    args = command.parse(arguments, parser)
    processes = Processes.join()
    try:
        cells = run_cells(grid(args.policies, args.budgets), args, processes)
        if processes.rank == 0:
            if all("refused" in cell for cell in cells):
                raise UserError(f"no cell of the sweep could be run; {cells[0]['refused']}")
            text = describe(cells)
            write_json(args.output_path / "sweep.json", {"cells": cells})
            write_whole(args.output_path / "sweep.md", lambda scratch: scratch.write_text(text))
            draw(cells, args.output_path / "sweep.png")
            print(text + str(args.output_path / "sweep.json"))
    finally:
        processes.leave()
