"""The folder of a run: no answer is lost, and runs with different settings or code never mix.

A folder is named by its policy and a hash of everything that changes answers, apart from the code.
It holds

- `settings.json`   what was hashed;
- `samples.jsonl`   one line per answered (or failed) sample, appended at once; a sample's last line counts;
- `results.json`    written when every sample has been asked, completely or not at all.

Every row names the code that answered it. Rows of other code, and with `--force` all rows, are put
aside as `samples.CODE.jsonl`, with their results, and the questions are asked anew. How many
questions a run takes is no part of its name: with a higher limit it goes on in the same folder.

Nothing of a folder is taken on trust. A damaged row is named and its sample asked again. Links are
refused, since writing through them would leave the folder. A folder is made or changed only when
there is an answer to write: what is refused before leaves everything as it was. A process that is
killed leaves at worst one incomplete line at the end, which the next start cuts off.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import msgspec

from eval.accuracy.outcomes import Outcome
from eval.accuracy.rows import Row, Rows, read_rows
from eval.accuracy.run_results import RunResults, decode_results
from eval.accuracy.run_settings import RunSettings, decode_settings, first_difference
from eval.json_files import write_json
from minivlm.errors import UserError
from minivlm.files import exists, is_folder, open_file, read_bytes, reason, write_whole

_NAMED_LINES = 5  # damaged lines that are named one by one


class RunFolder:
    """The folder `root`/`label`_`hash of settings`, or `root` itself if that is a run's folder.

    `note` is told, in one line each, what surprises about its content. Methods raise `UserError` if
    a file cannot be written or read, and `open` also for a folder that is not this run's.
    """

    def __init__(self, root: Path, label: str, settings: RunSettings, code: str, note: Callable[[str], None]) -> None:
        self.settings, self.code, self._note = settings, code, note
        self._is_root = exists(root / "settings.json")
        self.path = root if self._is_root else root / f"{label}_{settings.hash()}"
        self.samples = self.path / "samples.jsonl"
        self.results = self.path / "results.json"
        self._has_settings = False
        self._rows = Rows()
        self._current: list[Row] = []  # the rows that count, and those that are to be put aside
        self._stale: list[Row] = []
        self._unwritten: list[Outcome] = []
        self._in_order = False

    def open(self, problem: Callable[[Outcome], str], force: bool = False) -> dict[tuple[str, int], Outcome]:
        """Check that the folder belongs to this run, or can be made.

        Return the outcomes so far by task and index. Rows for which `problem` says why they cannot
        be this run's are damaged; rows of other code, or with `force` all rows, do not count.
        """
        if not exists(self.path):
            expect_folder(self.path)
            return {}
        self._expect_folder()
        self._has_settings = self._read_settings()
        self._rows = read_rows(self.samples, lambda outcome: problem(outcome) if outcome.code == self.code else "")
        for row in self._rows.good:
            (self._stale if force or row.outcome.code != self.code else self._current).append(row)
        for line in (*self._damage_in_words(), *self._stale_in_words(force)):
            self._note(line)
        return {row.outcome.key: row.outcome for row in self._current}

    def append(self, outcomes: Sequence[Outcome]) -> None:
        """Add outcomes at the end of samples.jsonl.

        On return they are in the operating system's hands. Only in a new folder, failures wait for
        the first answer: a run that answers nothing makes no folder.
        """
        self._unwritten += outcomes
        if not exists(self.path) and not any(outcome.answered for outcome in self._unwritten):
            return
        self.put_in_order()
        data = b"".join(msgspec.json.encode(outcome) + b"\n" for outcome in self._unwritten)
        self._unwritten = []
        try:
            file = os.open(self.samples, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                while data:
                    data = data[os.write(file, data) :]
            finally:
                os.close(file)
        except OSError as error:
            kept = "earlier answers are kept, and the same command continues from there"
            raise UserError(f"{self.samples}: cannot be written ({reason(error)}); {kept}") from None

    def put_in_order(self) -> None:
        """Make the folder, or put aside and cut off what `open` has found, before anything else is written."""
        if self._in_order:
            return
        make_folders(self.path)
        if not self._has_settings:
            write_json(self.path / "settings.json", msgspec.to_builtins(self.settings))
        if self._stale:
            self._put_aside()
        if self._stale or self._rows.damaged or self._rows.torn:
            _write_rows(self.samples, self._current)
        self._stale, self._in_order = [], True

    def read_results(self) -> RunResults | None:
        """What results.json says; None if there is none of this code, or a damaged one."""
        if self._stale or not exists(self.results):
            return None
        data = read_bytes(self.results)
        try:
            results = decode_results(data, str(self.results))
        except UserError as error:
            self._note(f"{error}; it is computed again from the rows")
            return None
        return results if results.code == self.code and results.settings == self.settings else None

    def write(self, name: str, content: Any) -> None:
        """Write a JSON file of the folder."""
        self.put_in_order()
        write_json(self.path / name, msgspec.to_builtins(content))

    def _expect_folder(self) -> None:
        """Refuse what is no folder, files that are none, and links: writing through them would leave the folder."""
        if not is_folder(self.path):
            raise UserError(f"{self.path}: is no folder (expected that of a run)")
        links = [] if self._is_root else [self.path]
        try:
            links += sorted(Path(entry.path) for entry in os.scandir(self.path))
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({reason(error)})") from None
        for path in filter(Path.is_symlink, links):
            raise UserError(f"{path}: is a link (expected what belongs to the run itself)")
        for path in (self.samples, self.results):
            if exists(path):
                open_file(path).close()

    def _read_settings(self) -> bool:
        """Whether settings.json holds this run's settings; false if it has to be written (again).

        Raises `UserError` for other settings, and for damaged ones that the folder's name does not
        stand for.
        """
        path = self.path / "settings.json"
        if not exists(path):
            return False
        data = read_bytes(path)
        try:
            stored = decode_settings(data, str(path))
        except UserError as error:
            if not self.path.name.endswith(f"_{self.settings.hash()}"):
                raise
            self._note(f"{error}; it is written again, as the folder's name says for which settings it is")
            return False
        if difference := first_difference(stored, self.settings):
            raise UserError(f"{self.path}: holds a run with other settings ({difference}); name another --output_path")
        return True

    def _damage_in_words(self) -> list[str]:
        damaged = self._rows.damaged
        again = "its sample is asked again unless another line answers it"
        lines = [f"{self.samples}: line {n} is damaged ({why}); {again}" for n, why in damaged.items()]
        more = len(lines) - _NAMED_LINES
        return [*lines[:_NAMED_LINES], *([f"{self.samples}: so are {more} more lines"] if more > 0 else [])]

    def _stale_in_words(self, force: bool) -> list[str]:
        if not self._stale:
            return []
        codes = dict.fromkeys(row.outcome.code for row in self._stale)
        why = "--force" if force else f"the code is now {self.code}"
        files = " and ".join(self._aside("samples", code).name for code in codes)
        return [f"{self.path}: {len(self._stale)} rows do not count ({why}) and are kept in {files}; all is asked anew"]

    def _put_aside(self) -> None:
        # The rows leave samples.jsonl last: killed in between, the next start does it all again.
        by_code: dict[str, list[Row]] = {}
        for row in self._stale:
            by_code.setdefault(row.outcome.code, []).append(row)
        if exists(self.results):
            try:
                self.results.rename(self._aside("results", next(iter(by_code))))
            except OSError as error:
                raise UserError(f"{self.results}: cannot be put aside ({reason(error)})") from None
        for code, rows in by_code.items():
            _write_rows(self._aside("samples", code), rows)

    def _aside(self, name: str, code: str) -> Path:
        """A free name for rows or results that are put aside."""
        ending = {"samples": "jsonl", "results": "json"}[name]
        names = (self.path / f"{name}.{code}{f'-{n}' if n > 1 else ''}.{ending}" for n in count(1))
        return next(path for path in names if not exists(path))


def _write_rows(path: Path, rows: Sequence[Row]) -> None:
    content = b"".join(row.line for row in rows)
    write_whole(path, lambda scratch: scratch.write_bytes(content))


def expect_folder(path: Path) -> None:
    """Check that a folder is there or can be made. Raises `UserError` if not."""
    _remove(make_folders(path))


def make_folders(path: Path) -> list[Path]:
    """Make a folder and those above it. Return the ones that were missing, the topmost first.

    Raises `UserError`, and makes none, if that is impossible.
    """
    missing = [path]
    while not exists(missing[0].parent):
        missing.insert(0, missing[0].parent)
    made: list[Path] = []
    try:
        for folder in missing:
            if not is_folder(folder):
                folder.mkdir()
                made.append(folder)
    except OSError as error:
        _remove(made)
        raise UserError(f"{path}: cannot write there ({reason(error)})") from None
    return made


def _remove(folders: Sequence[Path]) -> None:
    """Remove empty folders, given as `make_folders` returns them."""
    for folder in reversed(folders):
        folder.rmdir()
