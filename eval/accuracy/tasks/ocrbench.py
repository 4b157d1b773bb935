"""OCRBench (Liu et al., 2023): 1000 questions of ten types.

An answer is right if it contains a reference.

The questions carry their own instructions, so there is no suffix. Some answers are formulae, so the
limit is 128 tokens, as in lmms-eval.
"""

from __future__ import annotations

from eval.accuracy.metrics import contains_match
from eval.accuracy.records import Sample
from eval.accuracy.tasks.base import Task


class _OCRBench(Task):
    def prompt(self, sample: Sample) -> str:
        return sample.question.strip()

    def scores(self, prediction: str, sample: Sample) -> dict[str, float]:
        accuracy = contains_match(prediction, sample.answers, sample.source)
        return {**super().scores(prediction, sample), "ocrbench_accuracy": accuracy}


OCRBENCH = _OCRBench(
    "ocrbench",
    "test",
    "echo840/OCRBench",
    "data/test-*.parquet",
    metric="ocrbench_accuracy",
    max_new_tokens=128,
    suffix="",
)
