"""The folder of a run: nothing that was answered is lost, and different settings never mix.

A folder is named by a hash of everything that changes answers and holds

- `settings.json`   what was hashed;
- `samples.jsonl`   one line per answered (or failed) sample, appended at once; the last line of a sample counts;
- `results.json`    written when all is answered, whole or not at all.

A process killed at any moment leaves at worst one torn line at the end, which the next start cuts off. Versions of
packages are recorded in the results and not hashed.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from eval.accuracy.anls import mean
from minivlm.errors import UserError
from minivlm.files import write_whole

_BLOCKS, _BLOCK = 64, 1 << 16  # of every weights file, so many evenly spaced blocks of so many bytes are hashed


def key_of(settings: dict) -> str:
    """Twelve hexadecimal digits that stand for the settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def fingerprint(folder: Path) -> str:
    """What a checkpoint folder contains, cheaply: the small files whole, of the weights their sizes and 4 MB of each."""
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix not in (".json", ".jinja", ".safetensors"):
            continue
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode())
        with open(file, "rb") as stream:
            if file.suffix != ".safetensors" or size <= _BLOCKS * _BLOCK:
                digest.update(stream.read())
            else:
                for block in range(_BLOCKS):
                    stream.seek((size - _BLOCK) * block // (_BLOCKS - 1))
                    digest.update(stream.read(_BLOCK))
    return digest.hexdigest()[:16]


class RunFolder:
    """`root`/`label`_`key`, or `root` itself where that is the folder of this very run.

    Raises `UserError` where `root` holds a run with other settings, and wherever a file cannot be written or read.
    """

    def __init__(self, root: Path, label: str, settings: dict):
        self.settings = settings
        is_run = (root / "settings.json").exists()
        self.path = root if is_run else root / f"{label}_{key_of(settings)}"
        self.samples = self.path / "samples.jsonl"
        self.results = self.path / "results.json"

    def open(self) -> dict[tuple[str, int], dict]:
        """Creates the folder or checks that it is this run's -> the rows so far by (task, index)."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.path}: cannot write results there ({error.strerror})") from None
        stored = self.path / "settings.json"
        if stored.exists():
            if differing := _differing(read_json(stored), self.settings):
                raise UserError(
                    f"{self.path}: holds a run with other settings ({differing}); name another --output_path"
                )
        else:
            write_json(stored, self.settings)
        return {(row["task"], row["index"]): row for row in read_rows(self.samples, repair=True)}

    def append(self, rows: Sequence[dict]) -> None:
        """Adds rows at the end of samples.jsonl; when this returns, the operating system has them."""
        data = b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)
        try:
            file = os.open(self.samples, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                while data:
                    data = data[os.write(file, data) :]
            finally:
                os.close(file)
        except OSError as error:
            kept = "what was answered before is kept, the same command goes on from there"
            raise UserError(f"{self.samples}: cannot be written ({error.strerror}); {kept}") from None

    def finish(self, results: dict) -> None:
        """Writes results.json."""
        write_json(self.results, results)


def write_json(path: Path, content: dict | list) -> None:
    """Writes JSON whole or not at all."""
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    write_whole(path, lambda scratch: scratch.write_text(text, encoding="utf-8"))


def read_json(path: Path) -> Any:
    """The content of a JSON file of a run."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None


def read_rows(path: Path, repair: bool = False) -> list[dict]:
    """The lines of a samples.jsonl; `repair` cuts a torn last line off the file, otherwise it is only left out."""
    try:
        data = path.read_bytes() if path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]
        if repair and len(whole) < len(data):
            os.truncate(path, len(whole))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    rows = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            row = json.loads(line)
            row["task"], row["index"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}: line {number} is damaged (delete it, and its sample is asked again)") from None
        rows.append(row)
    return rows


def summarise(rows: Iterable[dict]) -> dict[str, float]:
    """Means and standard errors of every metric, and how many samples were scored, failed, or have no references."""
    rows = list(rows)
    summary: dict[str, float] = {}
    for metric in dict.fromkeys(name for row in rows for name in row.get("scores", ())):
        values = [row["scores"][metric] for row in rows if metric in row.get("scores", ())]
        summary[metric] = mean(values)
        summary[f"{metric}_stderr"] = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    summary["n"] = sum(bool(row.get("scores")) for row in rows)
    summary["failed"] = sum("error" in row for row in rows)
    summary["unscored"] = len(rows) - summary["n"] - summary["failed"]
    return summary


def by_type(rows: Iterable[dict]) -> dict[str, dict[str, float]]:
    """`summarise` for every question type in turn; a question may have several."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        for kind in row.get("types", ()):
            groups.setdefault(kind, []).append(row)
    return {kind: summarise(groups[kind]) for kind in sorted(groups)}


def _differing(stored: Any, now: Any, name: str = "") -> str:
    """The first place where two settings differ, in words; empty where they are equal."""
    if isinstance(stored, dict) and isinstance(now, dict):
        for key in sorted({*stored, *now}):
            if found := _differing(stored.get(key), now.get(key), f"{name}.{key}" if name else key):
                return found
        return ""
    return "" if stored == now else f"{name} {stored!r} there, {now!r} now"
