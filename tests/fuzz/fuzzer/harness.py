"""Runs cases, each in a folder of its own, and judges them."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from fuzzer.case import Box, Case, Family
from fuzzer.child import WALL_S, Ran, run_forked
from fuzzer.commands import call, run_real
from fuzzer.rule import changes, judge, snapshot

_SHOWN = 3000  # characters of an argument or a stream that are kept


@dataclass(frozen=True)
class Result:
    """What became of a case. `complaint` is empty unless the rule was broken."""

    name: str  # its number, or the name of a named case
    family: str
    outcome: str  # "accepted" or "refused"
    complaint: str
    seconds: float
    words: Sequence[str] = ()
    out: str = ""
    err: str = ""


@dataclass
class Harness:
    """Runs cases in folders below `work`, whose folder `shared` has the good inputs.

    With `keep`, the folders of cases stay. With `real`, each case also runs as a process of its own, and both have to
    end alike. `wall_s` is the time that a case may take.
    """

    work: Path
    shared: Path
    keep: bool = False
    real: bool = False
    wall_s: float = WALL_S
    _known: dict[tuple[str, ...], Ran] = field(default_factory=dict)  # what clean commands did

    def run(self, name: str, family: str, make: Family, seed: str) -> Result:
        """Make a case with random numbers from `seed`, run it in a forked child and judge it."""
        started = time.perf_counter()
        box = self._new_box(f"{family} {name}", seed)
        try:
            case = make(box)
        except Exception as error:
            raise RuntimeError(f"case {family} {name} cannot be made") from error
        ours, theirs = snapshot(box.root), snapshot(self.shared)
        ran = self._fork(case, box)
        changed = changes(ours, snapshot(box.root))
        outcome, complaint = judge(case, ran, box.root, changed)
        if damaged := changes(theirs, snapshot(self.shared)):
            complaint = complaint or f"changed shared inputs: {damaged[:3]}"
        if self.real and not complaint:
            shutil.rmtree(box.root)
            box = self._new_box(f"{family} {name}", seed)
            complaint = _difference(ran, run_real(make(box), box.root))
        if not self.keep:
            shutil.rmtree(box.root)
        places = {str(box.root): "CASE", str(self.shared): "SHARED"}
        words = [_replaced(word, places)[:_SHOWN] for word in case.words()]
        seconds = time.perf_counter() - started
        return Result(name, family, outcome, complaint, seconds, words, ran.out[-_SHOWN:], ran.err[-_SHOWN:])

    def clean(self, command: str, *arguments: object, keeps: bool = False, stdin: bytes = b"") -> Ran:
        """Run a command on good inputs, once. It has to succeed; what it writes into its own folder is forgotten.

        With `keeps`, it may write elsewhere: it makes shared inputs.
        """
        case = Case(command, arguments, stdin=stdin)
        key = (command, *case.words(), stdin.decode())
        if key not in self._known:
            box = self._new_box(f"clean-{len(self._known)}", "clean")
            ran = self._fork(case, box)
            if ran.status != 0 or ran.hung or (ran.touched and not keeps):
                raise RuntimeError(f"a clean {command} failed: {case.words()}\n{ran}")
            shutil.rmtree(box.root)
            self._known[key] = ran
        return self._known[key]

    def _fork(self, case: Case, box: Box) -> Ran:
        streams = self.work / "streams"
        streams.mkdir(exist_ok=True)
        return run_forked(
            lambda: call(case), box.root, streams, stdin=case.stdin, stdout=case.stdout, wall_s=self.wall_s
        )

    def _new_box(self, name: str, seed: str) -> Box:
        folder = re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII)[:60]
        return Box.make(self.work / folder, Random(seed), self.shared, self.clean)


def _replaced(word: str, names: dict[str, str]) -> str:
    for name, short in names.items():
        word = word.replace(name, short)
    return word


def _difference(forked: Ran, real: Ran) -> str:
    """How the forked child and the process of its own differ; "" if they do not."""
    for name in ("status", "out", "err"):
        ours, theirs = getattr(forked, name), getattr(real, name)
        if ours != theirs:
            return f"as a process of its own, its {name} is {theirs!r} instead of {ours!r}"
    return ""
