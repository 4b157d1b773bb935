"""What a task is: the words of its prompt, its scores, and where its data are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from eval.accuracy.anls import anls
from eval.accuracy.data import Dataset, download, read_docvqa_json
from eval.accuracy.metrics import exact_match
from eval.accuracy.parquet import read_parquet_files
from eval.accuracy.records import OtherSplit, Sample
from minivlm.files import exists, is_folder, user_path

SHORT = "\nAnswer the question using a single word or phrase."


@dataclass(frozen=True)
class Task:
    """One task.

    A subclass changes how it asks (`prompt`), scores (`scores`) or finds its data (`open`).
    """

    name: str
    split: str  # "validation" or "test"
    hub: str  # the id of the data set, used if --data is not given
    parquet: str  # a glob pattern of its files in that repository
    json: tuple[str, ...] = ()  # glob patterns of the official JSON's name, the preferred one first
    metric: str = "anls"  # the score that counts
    max_new_tokens: int = 32
    suffix: str = SHORT
    submission: bool = False  # has no references; the official submission file is written

    def prompt(self, sample: Sample) -> str:
        """What the user says to the model."""
        return sample.question + self.suffix

    def scores(self, prediction: str, sample: Sample) -> dict[str, float]:
        """Every metric of one answer; NaN if the sample has no references."""
        return {
            "exact_match": exact_match(prediction, sample.answers),
            "anls": anls(prediction, sample.answers),
        }

    def known_scores(self, prediction: str, sample: Sample) -> dict[str, float]:
        """The `scores` without those that are NaN."""
        return {name: score for name, score in self.scores(prediction, sample).items() if not math.isnan(score)}

    @property
    def metrics(self) -> frozenset[str]:
        """The names of the scores."""
        return frozenset(self.scores("", Sample(0, 0, "")))

    def open(self, data: str | None, seed: int, limit: float | None) -> Dataset:
        """Read the task's data from a folder, a JSON file or a hub id, limited by `limited_count`.

        `seed` matters only if pages are drawn. Raises `OtherSplit` if the data are there but not
        this task's split, and `UserError` for anything else.
        """
        place = user_path(data or self.hub)
        if not exists(place):
            place = download(data or self.hub, self.parquet)
        files = self.find(place) if is_folder(place) else place
        if files is None:
            expected = " or ".join((*self.json, self.parquet))
            raise OtherSplit(f"{data or self.hub}: no {self.split} data for task {self.name} (expected {expected})")
        if isinstance(files, Path):
            return read_docvqa_json(files, self.split).take(limit)
        return read_parquet_files(files, self.split).take(limit)

    def find(self, folder: Path) -> Path | Sequence[Path] | None:
        """The JSON file, or else the parquet files, of this task's split in a folder.

        None if there is neither.
        """
        for pattern in self.json:
            if matches := sorted(folder.glob(pattern)):
                return matches[0]
        for pattern in (self.parquet, Path(self.parquet).name):
            if matches := sorted(folder.glob(pattern)):
                return matches
        return None
