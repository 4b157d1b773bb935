"""TextVQA (Singh et al., CVPR 2019): text in photographs, scored over ten annotators.

lmms-eval prints this accuracy under the name `exact_match`. Here it is `vqa_accuracy`, and
`exact_match` means the same as in every other task.
"""

from __future__ import annotations

from eval.accuracy.metrics import vqa_accuracy
from eval.accuracy.records import Sample
from eval.accuracy.tasks.base import Task


class _TextVQA(Task):
    def prompt(self, sample: Sample) -> str:
        return sample.question.capitalize() + self.suffix

    def scores(self, prediction: str, sample: Sample) -> dict[str, float]:
        return {
            **super().scores(prediction, sample),
            "vqa_accuracy": vqa_accuracy(prediction, sample.answers),
        }


TEXTVQA_VAL = _TextVQA(
    "textvqa_val",
    "validation",
    "lmms-lab/textvqa",
    "data/validation-*.parquet",
    metric="vqa_accuracy",
)
