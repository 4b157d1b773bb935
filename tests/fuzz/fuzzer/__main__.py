"""The fuzzer's command line, to be started by `tests/fuzz/run.py`."""

from __future__ import annotations

import argparse
import gc
import json
import os
import shlex
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import matplotlib.font_manager  # noqa: F401  (makes its list of fonts now rather than in a case)
import torch

from fuzzer import named, planted, world
from fuzzer.case import Family
from fuzzer.child import WALL_S, adopt_orphans
from fuzzer.families import FAMILIES, family_of
from fuzzer.harness import Harness, Result

Job = tuple[str, str, Family, str]  # the arguments of `Harness.run`
LISTS: dict[str, dict[str, Family]] = {"named": named.NAMED, "planted": planted.PLANTED}


def main() -> int:
    """Run the cases that the flags ask for; returns 1 if one of them broke the rule."""
    args = parse()
    torch.set_num_threads(1)
    adopt_orphans()
    harness = Harness(args.work, args.work / "shared", keep=args.case is not None, real=args.real, wall_s=args.wall)
    world.build(harness.shared, harness.clean)
    gc.collect()
    gc.freeze()  # a collection in a child would copy the pages of all objects
    started = time.perf_counter()
    results = run_jobs(list(jobs(args)), harness, args)
    if args.results:
        args.results.write_text(json.dumps([asdict(result) for result in results], indent=1))
    print(table(results))
    print(f"{len(results)} cases of seed {args.seed} in {time.perf_counter() - started:.0f} s")
    return int(any(result.complaint for result in results))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser("tests/fuzz/run.py", description=__doc__)
    parser.add_argument("--seed", default="0", help="case N of a seed is always the same (0)")
    parser.add_argument("--cases", type=int, default=300, metavar="N", help="number of cases (300)")
    only = [*FAMILIES, *LISTS]
    parser.add_argument(
        "--only", nargs="+", choices=only, metavar="FAMILY", help=f"cases of these families: {', '.join(only)}"
    )
    parser.add_argument("--case", metavar="N|NAME", help="repeat one case, and keep its folder")
    parser.add_argument("--workers", type=int, default=1, metavar="W", help="cases that run at the same time (1)")
    parser.add_argument("--real", action="store_true", help="also run each case as a process of its own, and compare")
    parser.add_argument("--wall", type=float, default=WALL_S, help=f"seconds that a case may wait ({WALL_S:.0f})")
    parser.add_argument("--results", type=Path, metavar="OUT.json", help="write what became of each case")
    parser.add_argument("--work", type=Path, required=True, help=argparse.SUPPRESS)
    return parser.parse_args()


def jobs(args: argparse.Namespace) -> Iterator[Job]:
    """The cases to run: all of a list, or as many as asked for, counted from 0; of some families, their first ones."""
    only = args.only or list(FAMILIES)
    for family in only:
        for name, make in LISTS.get(family, {}).items():
            if args.case in (None, name):
                yield name, family, make, name
    if not set(only) & set(FAMILIES):
        return
    number, left = 0, args.cases
    if args.case is not None:
        number, left = int(args.case), 1
    while left:
        family = family_of(number)
        if family in only:
            yield str(number), family, FAMILIES[family], f"{args.seed}-{number}"
            left -= 1
        number += 1


def run_jobs(todo: list[Job], harness: Harness, args: argparse.Namespace) -> list[Result]:
    """Run the jobs, each process every `workers`-th of them; failures are printed at once."""

    def run_share(worker: int) -> None:
        harness.work = args.work / f"worker{worker}"
        harness.work.mkdir()
        with open(args.work / f"results{worker}", "w", encoding="utf-8") as out:
            for job in todo[worker :: args.workers]:
                result = harness.run(*job)
                print(json.dumps(asdict(result)), file=out)
                if result.complaint:
                    print(describe(result, args.seed), flush=True)

    in_processes(args.workers, run_share)
    lines = (args.work.joinpath(f"results{worker}").read_text().splitlines() for worker in range(args.workers))
    return [Result(**json.loads(line)) for each in lines for line in each]


def in_processes(count: int, run_share: Callable[[int], None]) -> None:
    """Call `run_share` with 0 ... count - 1, each in a forked process. Ends this one if one of them failed."""
    children = []
    for worker in range(count):
        if not (pid := os.fork()):
            adopt_orphans()
            run_share(worker)
            sys.stdout.flush()
            os._exit(0)
        children.append(pid)
    if any(os.waitpid(pid, 0)[1] for pid in children):
        sys.exit("the harness itself failed")


def describe(result: Result, seed: str) -> str:
    """A failed case: the complaint, how to repeat it, and what the command said."""
    only = f" --only {result.family}" if result.family in LISTS else f" --seed {seed}"
    words = shlex.join(word if len(word) < 300 else f"{word[:80]}…" for word in result.words)
    lines = [
        f"FAILED {result.family} {result.name}: {result.complaint}",
        f"  repeat: python tests/fuzz/run.py{only} --case {shlex.quote(result.name)}",
        f"  arguments: {words}",
        *(f"  | {line[:300]}" for line in result.err.splitlines()[-12:]),
    ]
    return "\n".join(lines).encode(errors="backslashreplace").decode()


def table(results: list[Result]) -> str:
    """How many cases of each family were accepted, refused and failed, and the seconds that they took."""
    lines = [f"{'':14}{'accepted':>9}{'refused':>9}{'failed':>9}{'seconds':>9}"]
    for family in [*dict.fromkeys(result.family for result in results), "all"]:
        own = [result for result in results if family in (result.family, "all")]
        counts = Counter("failed" if result.complaint else result.outcome for result in own)
        numbers = "".join(f"{counts[column]:9}" for column in ("accepted", "refused", "failed"))
        lines.append(f"{family:14}{numbers}{sum(result.seconds for result in own):9.0f}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
