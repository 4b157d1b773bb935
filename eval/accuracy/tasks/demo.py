"""The task of the bundled checkpoint: held-out pages, drawn on the spot. `--seed` draws others.

One question in ten asks for a long answer (the whole page, all fields, all values). These are asked
without the suffix, which would ask for a single word, and every question may take as many tokens as
the longest answer needs.
"""

from __future__ import annotations

from itertools import islice

from eval.accuracy.data import Dataset, limited_count
from eval.accuracy.records import Sample
from eval.accuracy.tasks.base import Task
from eval.demo.pages import LONG_TYPES, LONGEST_ANSWER, SUFFIX, heldout_pairs

PAGES = 500


class _Demo(Task):
    def prompt(self, sample: Sample) -> str:
        return sample.question if set(sample.types) & set(LONG_TYPES) else sample.question + self.suffix

    def open(self, data: str | None, seed: int, limit: float | None) -> Dataset:
        if data is not None:
            return super().open(data, seed, limit)
        samples, images = [], []
        pairs = islice(heldout_pairs(PAGES, seed), limited_count(limit, PAGES))
        for index, (page, question) in enumerate(pairs):
            length = "long" if question.type in LONG_TYPES else "short"
            samples.append(Sample(index, index, question.text, (question.answer,), (question.type, length)))
            images.append(page.image)
        name = f"demo pages, seed {seed}"
        return Dataset(name, tuple(samples), images.__getitem__, total=PAGES, identity=name)


DEMO = _Demo(
    "demo",
    "validation",
    "",
    "demo",
    json=("val_v*.json",),
    metric="exact_match",
    max_new_tokens=LONGEST_ANSWER + 1,
    suffix=SUFFIX,
)
