"""Data sets: the official DocVQA JSON layout with its image folder, and the hub's parquet files.

Both are read into the same `Dataset`: the questions, in memory, and a function that decodes one
image when its turn comes. The JSON layout is that of the DocVQA and InfographicVQA downloads
(rrc.cvc.uab.es, challenge 17). The parquet columns are those of lmms-lab/DocVQA, lmms-lab/textvqa
and echo840/OCRBench on the hub, which name some fields differently.
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
from typing import Any

from PIL import Image, ImageOps

from minivlm.errors import UserError
from minivlm.inputs.images import load_image

# The names of each field, in the order in which they are tried.
_ID = ("questionId", "question_id")
_ANSWERS = ("answers", "answer")
_TYPES = ("question_types", "question_type", "answer_type")
_SPLIT = ("data_split", "set_name")
_IMAGE = ("image", "image_local_name", "image_path")
_OTHER = ("question", "dataset")
_SPLIT_NAMES = {"validation": ("validation", "val"), "test": ("test",)}


class OtherSplit(UserError):
    """The data are there, but belong to another split than the task's."""


@dataclass(frozen=True)
class Sample:
    """One question.

    `index` is its place in the whole data set. Without `answers` it cannot be scored.
    """

    index: int
    id: int | str
    question: str
    answers: tuple[str, ...] = ()
    types: tuple[str, ...] = ()
    source: str = ""  # OCRBench: the data set from which the question was taken


@dataclass(frozen=True)
class Dataset:
    """Questions in order.

    `image(index)` decodes an image, or raises a `UserError` that names it.
    """

    origin: str
    samples: tuple[Sample, ...]
    image: Callable[[int], Image.Image]

    def take(self, limit: float | None) -> Dataset:
        """The first questions, as many as `limited_count` says."""
        return replace(self, samples=self.samples[: limited_count(limit, len(self.samples))])

    def identity(self) -> str:
        """A hash of the questions and their right answers; ids stand for the images."""
        asked = [(sample.id, sample.question, sample.answers) for sample in self.samples]
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]


def limited_count(limit: float | None, available: int) -> int:
    """How many of `available` questions `--limit` leaves.

    From 1 on, the limit is a count; below 1 it is a share, rounded up; None leaves all. Raises
    `UserError` for anything else.
    """
    if limit is None:
        return available
    if not (0 < limit < 1 or (limit >= 1 and limit == int(limit))):
        raise UserError(f"--limit {limit:g}: expected a count of at least 1, or a share between 0 and 1")
    return min(math.ceil(limit * available) if limit < 1 else int(limit), available)


def read_docvqa_json(path: Path, split: str) -> Dataset:
    """Read the official layout: `{"data": [{"questionId", "question", "image", ...}, ...]}`.

    `split` is "validation" or "test". An image's path is relative to the folder of the JSON file;
    images are also looked for in its folders `documents/` and `images/`. Raises `UserError` for a
    file that does not have this layout, and `OtherSplit` for one of another split.
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
    samples = _checked_samples(records, split, f"{path}: data")
    names = [_first_present(record, _IMAGE) for record in records]

    def image(index: int) -> Image.Image:
        name = names[index]
        if not isinstance(name, str) or not name:
            raise UserError(f'{path}: data[{index}] has no "image"')
        places = [path.parent / folder / name for folder in ("", "documents", "images")]
        return load_image(next((place for place in places if place.is_file()), places[0]))

    return Dataset(str(path), samples, image)


@dataclass(frozen=True)
class _RowGroup:
    """A part of a parquet file that is read at once, and the index of its first sample."""

    file: Path
    number: int
    first: int


def read_parquet_files(files: Sequence[Path], split: str) -> Dataset:
    """Read the parquet files of one split, in order.

    Images are read later, one row group at a time.

    Raises `UserError` without pyarrow, and for files that are damaged or lack a column.
    """
    try:
        import pyarrow
        import pyarrow.parquet as pq
    except ImportError:
        raise UserError(f"{files[0]}: reading parquet needs pyarrow (pip install 'minivlm[parquet]')") from None
    records: list[dict[str, Any]] = []
    groups: list[_RowGroup] = []
    wanted = {*_ID, *_ANSWERS, *_TYPES, *_SPLIT, *_OTHER}
    for file in files:
        try:
            with pq.ParquetFile(file) as table:
                columns = table.schema_arrow.names
                if missing := [name for name in ("question", "image") if name not in columns]:
                    raise UserError(f"{file}: no column {missing[0]!r}")
                for number in range(table.num_row_groups):
                    groups.append(_RowGroup(file, number, len(records)))
                    records += table.read_row_group(number, [name for name in columns if name in wanted]).to_pylist()
        except (OSError, pyarrow.ArrowException) as error:
            raise UserError(f"{file}: not a readable parquet file ({_first_line(error)})") from None
    folder = files[0].parent
    return Dataset(str(folder), _checked_samples(records, split, f"{folder}: row"), _ParquetImages(groups))


class _ParquetImages:
    """Decodes one image of a list of row groups.

    The last row group stays in memory, since its neighbours follow.
    """

    def __init__(self, groups: Sequence[_RowGroup]) -> None:
        self._groups = groups
        self._loaded: _RowGroup | None = None
        self._cells: list[Any] = []

    def __call__(self, index: int) -> Image.Image:
        import pyarrow

        group = self._groups[bisect(self._groups, index, key=lambda group: group.first) - 1]
        try:
            if group != self._loaded:
                self._load(group)
            cell = self._cells[index - group.first]
            data = cell.get("bytes") if isinstance(cell, dict) else cell
            if data is None:
                raise UserError("no image")
            return ImageOps.exif_transpose(load_image(Image.open(io.BytesIO(data))))
        except (UserError, OSError, pyarrow.ArrowException, Image.DecompressionBombError) as error:
            where = f"row {index - group.first} of row group {group.number}"
            raise UserError(f"{group.file}: {where}: {_first_line(error)}") from None

    def _load(self, group: _RowGroup) -> None:
        import pyarrow.parquet as pq

        with pq.ParquetFile(group.file) as table:
            self._cells = table.read_row_group(group.number, ["image"]).column("image").to_pylist()
        self._loaded = group


def download(repository: str, pattern: str) -> Path:
    """Download a data set's files from the hub.

    Return the snapshot folder in huggingface-hub's cache.

    Files that are already there are not downloaded again. Raises `UserError` if the download cannot
    be completed.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, repo_type="dataset", allow_patterns=[pattern]))
    except Exception as error:  # the errors of the hub's client and of its HTTP library
        reason = _first_line(error) or type(error).__name__
        raise UserError(f"{repository}: no such folder, and downloading it from the hub failed ({reason})") from None


def _checked_samples(records: Iterable[Any], split: str, where: str) -> tuple[Sample, ...]:
    """The questions in `records`.

    Raises `UserError` for bad ones, which are named `where`[index].
    """
    samples: list[Sample] = []
    index_of: dict[int | str, int] = {}
    for index, record in enumerate(records):
        if not isinstance(record, dict) or not isinstance(record.get("question"), str):
            raise UserError(f'{where}[{index}] has no "question"')
        question_id = _question_id(record, index)
        if question_id == "":
            raise UserError(f'{where}[{index}] has no "questionId"')
        if question_id in index_of:
            raise UserError(f"{where}[{index}] repeats questionId {question_id} of [{index_of[question_id]}]")
        index_of[question_id] = index
        declared = _first_present(record, _SPLIT)
        if declared is not None and declared not in _SPLIT_NAMES[split]:
            raise OtherSplit(f"{where}[{index}] belongs to split {declared!r} (expected {_SPLIT_NAMES[split][-1]!r})")
        answers, types = _texts(record, _ANSWERS), _texts(record, _TYPES)
        source = record.get("dataset") or ""
        samples.append(Sample(index, question_id, record["question"], answers, types, source))
    if not samples:
        raise UserError(f"{where}[] is empty")
    return tuple(samples)


def _question_id(record: dict[str, Any], index: int) -> int | str:
    """A record's id, as a number if it consists of digits; empty if it has none.

    OCRBench's ids are its indices.
    """
    name = _first_present(record, _ID)
    if name is None and "dataset" in record:
        return index
    text = "" if name is None else str(name)
    return int(text) if text.isdecimal() else text


def _first_present(record: dict[str, Any], names: Sequence[str]) -> Any:
    return next((record[name] for name in names if record.get(name) is not None), None)


def _texts(record: dict[str, Any], names: Sequence[str]) -> tuple[str, ...]:
    value = _first_present(record, names)
    if value is None:
        return ()
    return tuple(map(str, value)) if isinstance(value, list) else (str(value),)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "")
