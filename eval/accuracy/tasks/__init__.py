"""The registry of tasks: what is asked, in which words, how it is scored, and where its data are.

Names, prompts and token limits are those of lmms-eval for LLaVA (greedy decoding throughout), so
that figures can be compared. A task is one `Task` in a small file of this folder and one entry of
`TASKS`.
"""

from __future__ import annotations

from eval.accuracy.data import Dataset
from eval.accuracy.records import OtherSplit
from eval.accuracy.tasks.base import Task
from eval.accuracy.tasks.demo import DEMO
from eval.accuracy.tasks.docvqa import DOCVQA_TEST, DOCVQA_VAL
from eval.accuracy.tasks.infovqa import INFOVQA_VAL
from eval.accuracy.tasks.ocrbench import OCRBENCH
from eval.accuracy.tasks.textvqa import TEXTVQA_VAL
from minivlm.errors import UserError, printable

__all__ = ["GROUPS", "TASKS", "Task", "open_tasks"]

TASKS = {task.name: task for task in (DOCVQA_VAL, DOCVQA_TEST, INFOVQA_VAL, TEXTVQA_VAL, OCRBENCH, DEMO)}
GROUPS = {"docvqa": ("docvqa_val", "docvqa_test")}
_REFUSED = {"vqav2": "VQAv2", "nocaps": "Nocaps", "flickr30k": "Flickr30k"}


def open_tasks(
    names: str, data: str | None = None, seed: int = 0, limit: float | None = None
) -> tuple[list[tuple[Task, Dataset]], list[str]]:
    """Open the tasks with these comma-separated names.

    Return each with its data, and notes on what was left out.

    A group stands for its members. A member whose split is not among the data is left out with a
    note, unless that leaves no member. Raises `UserError` for an unknown or unsupported name and
    for data that cannot be used.
    """
    known = f"known: {', '.join((*GROUPS, *TASKS))}"
    opened: dict[str, tuple[Task, Dataset]] = {}
    notes: list[str] = []
    for name in filter(None, map(str.strip, names.split(","))):
        for start, title in _REFUSED.items():
            if name.lower().startswith(start):
                raise UserError(f"task {printable(name, 60)}: {title} is not supported ({known})")
        if name not in TASKS and name not in GROUPS:
            raise UserError(f"unknown task {printable(name, 60)!r} ({known})")
        members = GROUPS.get(name, (name,))
        missing = []
        for member in members:
            try:
                opened.setdefault(member, (TASKS[member], TASKS[member].open(data, seed, limit)))
            except OtherSplit as error:
                missing.append(error)
        if len(missing) == len(members):
            raise missing[0]
        notes += [f"left out: {error}" for error in missing]
    if not opened:
        raise UserError(f"no task named ({known})")
    return list(opened.values()), notes
