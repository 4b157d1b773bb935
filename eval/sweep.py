"""`python -m eval sweep`: a grid of policies and KV budgets, and accuracy drawn against the bytes they hold.

Every cell is an ordinary run in its own folder, so an interrupted sweep goes on where it was and a wider one takes
over what is done. `sweep.json` holds the grid, `sweep.md` its table, `sweep.png` the picture (matplotlib). A budget
that a policy cannot meet is recorded with its reason and does not stop the others.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from minivlm.cache import settings as cache
from minivlm.cache.settings import spellings
from minivlm.errors import UserError

from . import command
from .compare import Finished, table
from .processes import Processes
from .results import write_whole
from .runner import NothingAnswered, run
from .tasks import TASKS


def main(arguments: Sequence[str]) -> None:
    """Runs the grid; every flag of `python -m eval` holds for all its cells."""
    parser = command.Parser("python -m eval sweep", description="Runs policies at KV budgets.", allow_abbrev=False)
    parser.add_argument(*spellings("policies"), nargs="+", default=list(cache.REGISTRY), help="the policies (all)")
    parser.add_argument(*spellings("budgets"), nargs="+", type=float, default=[0.75, 0.5, 0.25, 0.1],
                        help="shares of the prompt's KV bytes (0.75 0.5 0.25 0.1); `full` runs once, without one")
    command.add_arguments(parser)
    args = command.parse(arguments, parser)
    processes = Processes.join()
    try:
        cells = _run_cells(args, arguments, parser, processes)
        if processes.rank == 0:
            _write(cells, args.output_path)
    finally:
        processes.leave()


def _run_cells(args, arguments: Sequence[str], parser, processes: Processes) -> list[dict]:
    """The cells of the grid in order: policy, budget, folder and the content of its results.json, or why it has none."""
    base, load = command.prepare(args), command.loader(args)
    grid = [(policy, budget) for policy in args.policies for budget in ([None] if policy == "full" else args.budgets)]
    cells = []
    for policy, budget in grid:
        cell = {"policy": policy, "budget": budget}
        flags = ["--policy", policy] + ([] if budget is None else ["--kv_budget", str(budget)])
        if processes.rank == 0:
            print(" ".join(flags), file=sys.stderr)
        try:
            settings = cache.from_args(parser.parse_args([*arguments, *flags]), args.seed)
        except UserError as error:
            cells.append({**cell, "refused": str(error)})
            continue
        try:
            folder, results = run(replace(base, settings=settings), args.output_path, load, processes)
            cells.append({**cell, "folder": folder.name, **results})
        except NothingAnswered as error:
            cells.append({**cell, "refused": str(error)})
    return cells


def _write(cells: list[dict], output: Path) -> None:
    done = [cell for cell in cells if "refused" not in cell]
    if not done:
        raise UserError(f"no cell of the sweep could be run; {cells[0]['refused']}")
    text = table([Finished(_name(cell), cell, {}) for cell in done])
    text += "".join(f"{_name(cell)}: refused, {cell['refused']}\n" for cell in cells if "refused" in cell)
    write_whole(output / "sweep.json", {"cells": cells})
    write_whole(output / "sweep.md", text.encode())
    print(text, end="")
    if not any(numbers["n"] for numbers in done[0]["results"].values()):
        print("note: no picture, since nothing was scored", file=sys.stderr)
    elif find_spec("matplotlib") is None:
        print("note: no picture without matplotlib (pip install 'minivlm[plots]')", file=sys.stderr)
    else:
        draw(done, output / "sweep.png")
    print(output / "sweep.json")


def _name(cell: dict) -> str:
    return cell["policy"] + ("" if cell["budget"] is None else f" {cell['budget']:.0%}")


def draw(cells: Sequence[dict], path: Path) -> None:
    """Draws the metrics of the first task against the KV bytes a page holds, one line per policy, with standard errors.

    A cell that answered fewer samples than others (a budget too small for the longest prompts) is left out: its score
    is over other questions.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    task = next(task for task in cells[0]["cost"] if cells[0]["results"][task]["n"])
    cells = [cell for cell in cells if cell["results"][task]["n"] == max(each["results"][task]["n"] for each in cells)]
    numbers = cells[0]["results"][task]
    metrics = [name for name in dict.fromkeys((TASKS[task].metric, "anls", "exact_match")) if name in numbers]
    unit, scale = ("MiB", 2**20) if cells[0]["cost"][task]["kv_full_bytes_mean"] > 2**21 else ("KiB", 2**10)
    figure = Figure(figsize=(5.5 * len(metrics), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, metric in zip(figure.subplots(1, len(metrics), squeeze=False)[0], metrics):
        for policy in dict.fromkeys(cell["policy"] for cell in cells):
            line = sorted(
                (cell["cost"][task]["kv_bytes_mean"] / scale, cell["results"][task][metric], cell["results"][task][f"{metric}_stderr"])
                for cell in cells if cell["policy"] == policy)
            held, scores, errors = zip(*line)
            if policy == "full":
                axes.axhline(scores[0], color="0.5", linestyle="--", linewidth=1)
            axes.errorbar(held, scores, errors, marker="o", markersize=4, capsize=2, label=policy)
        axes.set_xlabel(f"KV cache held per page ({unit})")
        axes.set_ylabel(metric.replace("_", " "))
        axes.set_ylim(0, 1.02)
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
    figure.axes[0].legend(title="policy")
    figure.suptitle(f"{task}, n = {numbers['n']}")
    figure.savefig(path, dpi=150)
