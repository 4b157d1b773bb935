"""The rule: what may come of a case, whatever its input was."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Sequence
from pathlib import Path

from fuzzer.case import Case, Expect
from fuzzer.child import Ran

Snapshot = dict[str, tuple[object, ...]]  # of everything in a folder: kind, mode, size, time of the last change, link

# What commands may say on stderr beside `note: ` while they work: progress, and the statistics of --stats.
_PROGRESS = re.compile(r"[\w ]+: +\d+%\|.*|\d+%\|.*|[\w ]+: \d+page \[.*| *")
_SAID_MEANWHILE = {
    "generate.py": re.compile(r"(prefill|decode|KV cache) .*|[\d.]+ entries per layer and head took part .*"),
    "eval": re.compile(r"failed: .*|[\w.%+ -]+: --policy .*"),
}
ACCEPTED, REFUSED = "accepted", "refused"


def snapshot(folder: Path) -> Snapshot:
    """What is in a folder, by name."""
    entries: Snapshot = {}
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = os.path.join(parent, name)
            now = os.lstat(path)
            detail: tuple[object, ...] = (stat.S_IFMT(now.st_mode), stat.S_IMODE(now.st_mode))
            if stat.S_ISREG(now.st_mode):
                detail += (now.st_size, now.st_mtime_ns)
            if stat.S_ISLNK(now.st_mode):
                detail += (os.readlink(path),)
            entries[os.path.relpath(path, folder)] = detail
    return entries


def changes(before: Snapshot, after: Snapshot) -> list[str]:
    """The names of what appeared, vanished or changed."""
    return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))


def judge(case: Case, ran: Ran, folder: Path, changed: Sequence[str]) -> tuple[str, str]:
    """Whether a case was "accepted" or "refused", and what breaks the rule; "" if nothing does.

    `changed` are the names of what changed in the case's `folder`.
    """
    if ran.hung:
        return REFUSED, "hang: it used up its time"
    if ran.status < 0:
        return REFUSED, f"died of signal {-ran.status}"
    if "Traceback (most recent call last)" in ran.err or "Exception ignored" in ran.err:
        return REFUSED, f"traceback: {_last_line(ran.err)}"
    if ran.left_running:
        return REFUSED, "left a process running"
    if ran.touched:
        return REFUSED, f"touched what is not its own: {'; '.join(ran.touched[:3])}"
    if ran.status == 0:
        return ACCEPTED, _wrong_answer(case, ran, folder, changed)
    return REFUSED, _wrong_refusal(case, ran, changed)


def _wrong_answer(case: Case, ran: Ran, folder: Path, changed: Sequence[str]) -> str:
    if case.expect is Expect.REFUSAL:
        return "accepted what cannot be meant"
    allowed = [os.path.relpath(output, folder) for output in case.outputs]
    stray = [name for name in changed if not any(own in (".", name) or name.startswith(f"{own}/") for own in allowed)]
    if stray:
        return f"stray files: {stray[:3]}"
    unknown = [line for line in _lines(ran.err) if not line.startswith("note: ") and not _meanwhile(case, line)]
    if unknown:
        return f"an answer with a word on stderr that is no note: {unknown[0][:200]!r}"
    try:
        if case.check is not None:
            case.check(ran)
    except Exception as error:
        return f"wrong answer: {type(error).__name__}: {str(error)[:300]}"
    return ""


def _wrong_refusal(case: Case, ran: Ran, changed: Sequence[str]) -> str:
    if ran.status != 2:
        return f"status {ran.status} (expected 0 or 2)"
    lines = [line for line in _lines(ran.err) if line.startswith("error: ") or not _meanwhile(case, line)]
    if case.is_chat:  # what was answered or refused before stays
        lines = lines[-1:]
    if len(lines) != 1 or not lines[0].startswith("error: ") or not ran.err.endswith("\n"):
        return f"a refusal of {len(lines)} lines (expected one that begins `error: `): {lines[:3]!r}"
    if not lines[0].removeprefix("error: ").strip():
        return "a refusal without a word"
    if ran.out and not case.is_chat and not case.answers_first:
        return f"a refusal that prints on stdout: {ran.out[:100]!r}"
    if changed and not case.answers_first:
        return f"a refusal that changed files: {changed[:3]}"
    if case.expect is Expect.ANSWER:
        return f"refused what is right: {lines[0][:200]}"
    return ""


def _lines(err: str) -> list[str]:
    """The lines of stderr, without the states of a progress bar, which are drawn over each other."""
    return [line for line in re.split("[\n\r]", err) if not _PROGRESS.fullmatch(line)]


def _meanwhile(case: Case, line: str) -> bool:
    """Whether a command says this while it works; in a chat, a turn may be refused and the next one answered."""
    said = _SAID_MEANWHILE.get(case.command)
    return bool(said is not None and said.fullmatch(line)) or (case.is_chat and line.startswith("error: "))


def _last_line(err: str) -> str:
    """The last line of a traceback, and the place in this repository where it was raised."""
    places = re.findall(r'File "[^"]*?/((?:minivlm|weights|eval|scripts|tests)/[^"]+)", line (\d+)', err)
    raised = ":".join(places[-1]) if places else "?"
    return f"{err.strip().splitlines()[-1][:200]} ({raised})"
