"""The folder of a run: no answer is lost, and runs with different settings never mix.

A folder is named by a hash of everything that changes answers. It holds

- `settings.json`   what was hashed;
- `samples.jsonl`   one line per answered (or failed) sample, appended at once; a sample's last line counts;
- `results.json`    written when every sample has been asked, completely or not at all.

A process that is killed leaves at worst one incomplete line at the end, which the next start cuts
off. Package versions are recorded in the results but not hashed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.accuracy.outcomes import Outcome
from eval.json_files import write_json
from minivlm.errors import UserError
from minivlm.schema import read_json_object

_BLOCKS = 64  # evenly spaced blocks of a large weights file that are hashed
_BLOCK_BYTES = 1 << 16


def hash_settings(settings: Mapping[str, Any]) -> str:
    """Twelve hexadecimal digits that stand for the settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def fingerprint(folder: Path) -> str:
    """A hash of a checkpoint folder that is cheap to compute.

    Small files are hashed whole. Of a large weights file, its size and 4 MiB of its content are
    hashed.
    """
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix not in (".json", ".jinja", ".safetensors"):
            continue
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode())
        with open(file, "rb") as stream:
            if file.suffix != ".safetensors" or size <= _BLOCKS * _BLOCK_BYTES:
                digest.update(stream.read())
            else:
                for block in range(_BLOCKS):
                    stream.seek((size - _BLOCK_BYTES) * block // (_BLOCKS - 1))
                    digest.update(stream.read(_BLOCK_BYTES))
    return digest.hexdigest()[:16]


class RunFolder:
    """The folder `root`/`label`_`hash of settings`, or `root` itself if that is a run's folder.

    Methods raise `UserError` if `root` holds a run with other settings, or if a file cannot be
    written or read.
    """

    def __init__(self, root: Path, label: str, settings: Mapping[str, Any]) -> None:
        self.settings = settings
        is_run = (root / "settings.json").exists()
        self.path = root if is_run else root / f"{label}_{hash_settings(settings)}"
        self.samples = self.path / "samples.jsonl"
        self.results = self.path / "results.json"

    def open(self) -> dict[tuple[str, int], Outcome]:
        """Create the folder, or check that it belongs to this run.

        Return the outcomes so far by (task, index).
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.path}: cannot write results there ({error.strerror})") from None
        stored = self.path / "settings.json"
        if not stored.exists():
            write_json(stored, self.settings)
        elif difference := _first_difference(read_json_object(stored), self.settings):
            raise UserError(f"{self.path}: holds a run with other settings ({difference}); name another --output_path")
        return {(outcome["task"], outcome["index"]): outcome for outcome in read_outcomes(self.samples, repair=True)}

    def append(self, outcomes: Sequence[Outcome]) -> None:
        """Add outcomes at the end of samples.jsonl.

        On return they are in the operating system's hands.
        """
        data = b"".join(json.dumps(outcome, ensure_ascii=False).encode() + b"\n" for outcome in outcomes)
        try:
            file = os.open(self.samples, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                while data:
                    data = data[os.write(file, data) :]
            finally:
                os.close(file)
        except OSError as error:
            kept = "earlier answers are kept, and the same command continues from there"
            raise UserError(f"{self.samples}: cannot be written ({error.strerror}); {kept}") from None

    def finish(self, results: Mapping[str, Any]) -> None:
        """Write results.json."""
        write_json(self.results, results)


def read_outcomes(path: Path, repair: bool = False) -> list[Outcome]:
    """Read a samples.jsonl; a missing file has no outcomes.

    An incomplete last line is ignored; with `repair` it is also cut off the file. Raises
    `UserError` if the file cannot be read or another line is damaged.
    """
    try:
        data = path.read_bytes() if path.exists() else b""
        complete = data[: data.rfind(b"\n") + 1]
        if repair and len(complete) < len(data):
            os.truncate(path, len(complete))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    outcomes = []
    for number, line in enumerate(complete.splitlines(), 1):
        try:
            outcome = json.loads(line)
            _ = outcome["task"], outcome["id"], outcome["index"], outcome["types"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}: line {number} is damaged (delete it, and its sample is asked again)") from None
        outcomes.append(outcome)
    return outcomes


def _first_difference(stored: Any, now: Any, name: str = "") -> str:
    """Describe the first place where two settings differ; empty if they are equal."""
    if isinstance(stored, dict) and isinstance(now, dict):
        for key in sorted({*stored, *now}):
            if difference := _first_difference(stored.get(key), now.get(key), f"{name}.{key}" if name else key):
                return difference
        return ""
    return "" if stored == now else f"{name} {stored!r} there, {now!r} now"
