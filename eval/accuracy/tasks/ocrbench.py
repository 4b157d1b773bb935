"""OCRBench (Liu et al., 2023): 1000 questions in ten kinds, right when the answer contains a reference.

The questions carry their own instructions, so no suffix; some answers are formulae, so 128 tokens, as in lmms-eval.
"""

from __future__ import annotations

from eval.accuracy.data import Sample
from eval.accuracy.metrics import contains_match
from eval.accuracy.tasks.base import Task


class _OCRBench(Task):
    def prompt(self, sample: Sample) -> str:
        return sample.question.strip()

    def scores(self, prediction: str, sample: Sample) -> dict[str, float]:
        right = contains_match(prediction, sample.answers, sample.source)
        return {**super().scores(prediction, sample), "ocrbench_accuracy": right}


OCRBENCH = _OCRBench(
    "ocrbench",
    "test",
    "echo840/OCRBench",
    "data/test-*.parquet",
    metric="ocrbench_accuracy",
    max_new_tokens=128,
    suffix="",
)
