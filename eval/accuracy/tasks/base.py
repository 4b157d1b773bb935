"""What a task is: the words of its prompt, its scores, and where its data lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from eval.accuracy.anls import anls
from eval.accuracy.data import Dataset, OtherSplit, Sample, fetch, read_json, read_parquet
from eval.accuracy.metrics import exact_match

SHORT = "\nAnswer the question using a single word or phrase."


@dataclass(frozen=True)
class Task:
    """One task; a subclass changes how it asks (`prompt`), scores (`scores`) or finds its data (`open`)."""

    name: str
    split: str  # "validation" or "test"
    hub: str  # the data set's id, used where --data is not given
    parquet: str  # glob of its files in that repository
    json: tuple[str, ...] = ()  # globs of the official JSON's name, best first
    metric: str = "anls"  # the score that counts
    max_new_tokens: int = 32
    suffix: str = SHORT
    submission: bool = False  # without references: writes the official submission file

    def prompt(self, sample: Sample) -> str:
        """What the user says to the model."""
        return sample.question + self.suffix

    def scores(self, prediction: str, sample: Sample) -> dict[str, float]:
        """Every metric of one answer; NaN where the sample has no references."""
        return {"exact_match": exact_match(prediction, sample.answers), "anls": anls(prediction, sample.answers)}

    def open(self, data: str | None, seed: int, limit: float | None) -> Dataset:
        """The first `limit` samples of a folder, a JSON file or a hub id; `seed` matters where pages are drawn.

        Raises `OtherSplit` where the data are there but not this task's split, `UserError` for anything else.
        """
        place = Path(data or self.hub).expanduser()
        if not place.exists():
            place = fetch(data or self.hub, self.parquet)
        found = place if place.is_file() else self.find(place)
        if found is None:
            expected = " or ".join((*self.json, self.parquet))
            raise OtherSplit(f"{data or self.hub}: no {self.split} data for task {self.name} (expected {expected})")
        dataset = read_json(found, self.split) if isinstance(found, Path) else read_parquet(found, self.split)
        return dataset.take(limit)

    def find(self, folder: Path) -> Path | Sequence[Path] | None:
        """The JSON file, or the parquet files, of this task's split in a folder; None where there is neither."""
        for pattern in self.json:
            if matches := sorted(folder.glob(pattern)):
                return matches[0]
        for pattern in (self.parquet, Path(self.parquet).name):
            if matches := sorted(folder.glob(pattern)):
                return matches
        return None
