"""Data sets: the questions, in memory, and a function that decodes one image when its turn comes.

Here are the official DocVQA JSON layout with its image folder, that of the DocVQA and
InfographicVQA downloads (rrc.cvc.uab.es, challenge 17), and downloads from the hub, whose files
`eval.accuracy.parquet` reads.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any

import msgspec
from PIL import Image

from eval.accuracy.records import Sample, expect_split, read_samples
from minivlm.errors import UserError, printable
from minivlm.files import exists, read_bytes, reason
from minivlm.inputs.images import load_image
from minivlm.schema import convert

_LONGEST_NUMBER = 1000  # digits of a JSON integer that is read as one


@dataclass(frozen=True)
class Dataset:
    """Questions in order, and how to get their images.

    `image(index)` decodes an image, or raises a `UserError` that names it. `samples` are all of the
    data set's `total` questions, or the first ones after `take`. `identity` stands for the whole
    data set, whatever is taken of it.
    """

    origin: str
    samples: tuple[Sample, ...]
    image: Callable[[int], Image.Image]
    total: int
    identity: str

    @classmethod
    def whole(cls, origin: str, samples: tuple[Sample, ...], image: Callable[[int], Image.Image]) -> Dataset:
        """A data set of these questions; ids stand for the images in its identity."""
        asked = [(sample.id, sample.question, sample.answers) for sample in samples]
        identity = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]
        return cls(origin, samples, image, len(samples), identity)

    def take(self, limit: float | None) -> Dataset:
        """The first questions, as many as `limited_count` says."""
        return replace(self, samples=self.samples[: limited_count(limit, self.total)])


def limited_count(limit: float | None, available: int) -> int:
    """How many of `available` questions `--limit` leaves.

    From 1 on, the limit is a count; below 1 it is a share, rounded up; None leaves all. Raises
    `UserError` for anything else.
    """
    if limit is None:
        return available
    if not (0 < limit < 1 or (limit >= 1 and float(limit).is_integer())):
        raise UserError(f"--limit {limit:g}: expected a count of at least 1, or a share between 0 and 1")
    return min(math.ceil(limit * available) if limit < 1 else int(limit), available)


class _Layout(msgspec.Struct):
    """The official layout; its records are checked one by one."""

    data: list[Any]
    dataset_split: str | None = None


def read_docvqa_json(path: Path, split: str) -> Dataset:
    """Read the official layout: `{"data": [{"questionId", "question", "image", ...}, ...]}`.

    `split` is "validation" or "test". An image's path is relative to the folder of the JSON file;
    images are also looked for in its folders `documents/` and `images/`. A name cannot leave the
    folder, but links in it are followed. Raises `UserError` for a file that does not have this
    layout, and `OtherSplit` for one of another split.
    """
    layout = convert(_parsed(path), _Layout, str(path))
    expect_split(layout.dataset_split, split, f"{path}: holds")
    samples = read_samples(layout.data, split, f"{path}: data", named_images=True)

    def image(index: int) -> Image.Image:
        name = PurePath(samples[index].image)
        if name.is_absolute() or ".." in name.parts:
            raise UserError(f"{name}: leaves the folder of the data (expected a name inside {path.parent})")
        places = [path.parent / folder / name for folder in ("", "documents", "images")]
        return load_image(next(filter(exists, places), places[0]))

    return Dataset.whole(str(path), samples, image)


def _parsed(path: Path) -> Any:
    """A JSON file as Python's own objects.

    json reads what msgspec refuses as a whole because of one record: lone surrogates, NaN, and
    numbers of thousands of digits, which stay text here.
    """
    try:
        return json.loads(
            read_bytes(path), parse_int=lambda digits: int(digits) if len(digits) <= _LONGEST_NUMBER else digits
        )
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable JSON ({error})") from None


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
        why = printable(reason(error), 300)
        raise UserError(f"{repository}: no such folder, and downloading it from the hub failed ({why})") from None
