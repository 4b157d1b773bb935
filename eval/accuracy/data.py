"""Data sets: the official DocVQA JSON layout with its image folder, and the hub's parquet files.

Both give the same `Dataset`: what is asked, in memory, and a function that decodes one image when its turn comes. The
JSON layout is that of the DocVQA and InfographicVQA downloads (rrc.cvc.uab.es, challenge 17); the parquet columns are
those of the hub's lmms-lab/DocVQA, lmms-lab/textvqa and echo840/OCRBench, whose names for a field differ.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from bisect import bisect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image, ImageOps

from minivlm.errors import UserError
from minivlm.inputs.images import load_image

# The names a field goes by, in the order in which they are looked for.
_ID = ("questionId", "question_id")
_ANSWERS = ("answers", "answer")
_TYPES = ("question_types", "question_type", "answer_type")
_SPLIT = ("data_split", "set_name")
_IMAGE = ("image", "image_local_name", "image_path")
_OTHER = ("question", "dataset")
_SPLIT_NAMES = {"validation": ("validation", "val"), "test": ("test",)}


class OtherSplit(UserError):
    """The data are there, but of another split than the task's."""


@dataclass(frozen=True)
class Sample:
    """One question. `index` is its place in the whole data set; no `answers` means that it cannot be scored."""

    index: int
    id: int | str
    question: str
    answers: tuple[str, ...] = ()
    types: tuple[str, ...] = ()
    source: str = ""  # OCRBench: the data set it was taken from


@dataclass(frozen=True)
class Dataset:
    """Questions in order, and `image(index)`, which decodes the image of one or raises `UserError` naming it."""

    origin: str
    samples: tuple[Sample, ...]
    image: Callable[[int], Image.Image]

    def take(self, limit: float | None) -> Dataset:
        """The first `limit` questions: a count from 1 on, a share (rounded up) below 1, None for all."""
        if limit is None:
            return self
        if not (0 < limit < 1 or (limit >= 1 and limit == int(limit))):
            raise UserError(f"--limit {limit:g}: expected a count from 1 on or a share between 0 and 1")
        count = math.ceil(limit * len(self.samples)) if limit < 1 else int(limit)
        return replace(self, samples=self.samples[:count])

    def identity(self) -> str:
        """A hash of what is asked and what is right; the images stand behind the ids."""
        asked = [(sample.id, sample.question, sample.answers) for sample in self.samples]
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]


def read_json(path: Path, split: str) -> Dataset:
    """The official layout: `{"data": [{"questionId", "question", "image", "answers", …}, …]}`, images beside it.

    `split` is "validation" or "test". An image's path is relative to the JSON's folder (also found under `documents/`
    and `images/`). Raises `UserError` for a file that is not this layout or belongs to another split.
    """
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    records = content.get("data") if isinstance(content, dict) else None
    if not isinstance(records, list):
        raise UserError(f'{path}: no "data" list (expected the official DocVQA layout)')
    declared = content.get("dataset_split")
    if declared is not None and declared not in _SPLIT_NAMES[split]:
        raise OtherSplit(f"{path}: holds split {declared!r} (expected {_SPLIT_NAMES[split][-1]!r})")
    samples = _samples(records, split, f"{path}: data")
    names = [_first(record, _IMAGE) for record in records]

    def image(index: int) -> Image.Image:
        name = names[index]
        if not isinstance(name, str) or not name:
            raise UserError(f'{path}: data[{index}] has no "image"')
        places = [path.parent / name, path.parent / "documents" / name, path.parent / "images" / name]
        return load_image(next((place for place in places if place.is_file()), places[0]))

    return Dataset(str(path), samples, image)


def read_parquet(files: Sequence[Path], split: str) -> Dataset:
    """Parquet shards of one split, in order. Texts are read at once; images one row group at a time, when needed.

    Raises `UserError` without pyarrow, and for files that are damaged or lack a column.
    """
    try:
        import pyarrow
        import pyarrow.parquet as pq
    except ImportError:
        raise UserError(f"{files[0]}: reading parquet needs pyarrow (pip install 'minivlm[parquet]')") from None
    records: list[dict] = []
    groups: list[tuple[Path, int, int]] = []  # (file, row group, index of its first row)
    wanted = {*_ID, *_ANSWERS, *_TYPES, *_SPLIT, *_OTHER}
    for file in files:
        try:
            with pq.ParquetFile(file) as table:
                columns = table.schema_arrow.names
                if missing := [name for name in ("question", "image") if name not in columns]:
                    raise UserError(f"{file}: no column {missing[0]!r}")
                for group in range(table.num_row_groups):
                    groups.append((file, group, len(records)))
                    records += table.read_row_group(group, [name for name in columns if name in wanted]).to_pylist()
        except (OSError, pyarrow.ArrowException) as error:
            raise UserError(f"{file}: not a readable parquet file ({_line(error)})") from None
    held: tuple[int, list] = (-1, [])  # the one row group in memory: (its place in groups, images)

    def image(index: int) -> Image.Image:
        nonlocal held
        place = bisect(groups, index, key=lambda group: group[2]) - 1
        file, group, first = groups[place]
        try:
            if held[0] != place:
                with pq.ParquetFile(file) as table:
                    held = (place, table.read_row_group(group, ["image"]).column("image").to_pylist())
            cell = held[1][index - first]
            data = cell.get("bytes") if isinstance(cell, dict) else cell
            if data is None:
                raise UserError("no image")
            return ImageOps.exif_transpose(load_image(Image.open(io.BytesIO(data))))
        except (UserError, OSError, pyarrow.ArrowException, Image.DecompressionBombError) as error:
            raise UserError(f"{file}: row {index - first} of row group {group}: {_line(error)}") from None

    return Dataset(str(files[0].parent), _samples(records, split, f"{files[0].parent}: row"), image)


def fetch(repo: str, pattern: str) -> Path:
    """Files of a data set on the hub -> the snapshot folder in huggingface-hub's cache; what is there is not fetched
    again. Raises `UserError` for whatever keeps the download from being complete."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, repo_type="dataset", allow_patterns=[pattern]))
    except Exception as error:  # the hub client's errors and its HTTP library's own
        reason = _line(error) or type(error).__name__
        raise UserError(f"{repo}: no such folder, and the hub's data set could not be had ({reason})") from None


def _samples(records: Iterable[dict], split: str, where: str) -> tuple[Sample, ...]:
    """Checked questions; `where` + "[index]" names one in an error."""
    samples, seen = [], {}
    for index, record in enumerate(records):
        if not isinstance(record, dict) or not isinstance(record.get("question"), str):
            raise UserError(f'{where}[{index}] has no "question"')
        name = _first(record, _ID)
        if name is None and "dataset" in record:  # OCRBench numbers nothing
            name = index
        if name is None or name == "":
            raise UserError(f'{where}[{index}] has no "questionId"')
        name = int(name) if str(name).isdecimal() else str(name)
        if name in seen:
            raise UserError(f"{where}[{index}] repeats questionId {name} of [{seen[name]}]")
        seen[name] = index
        declared = _first(record, _SPLIT)
        if declared is not None and declared not in _SPLIT_NAMES[split]:
            raise OtherSplit(f"{where}[{index}] belongs to split {declared!r} (expected {_SPLIT_NAMES[split][-1]!r})")
        answers, types = _texts(record, _ANSWERS), _texts(record, _TYPES)
        samples.append(Sample(index, name, record["question"], answers, types, record.get("dataset") or ""))
    if not samples:
        raise UserError(f"{where}[] is empty")
    return tuple(samples)


def _first(record: dict, names: Sequence[str]) -> object:
    return next((record[name] for name in names if record.get(name) is not None), None)


def _texts(record: dict, names: Sequence[str]) -> tuple[str, ...]:
    found = _first(record, names)
    if found is None:
        return ()
    return tuple(map(str, found)) if isinstance(found, list) else (str(found),)


def _line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "")
