"""DocVQA (Mathew et al., WACV 2021): questions about scanned pages, scored by ANLS.

The test split has no public answers; its predictions are written as the file that the challenge's
server accepts.
"""

from eval.accuracy.tasks.base import Task

DOCVQA_VAL = Task(
    "docvqa_val",
    "validation",
    "lmms-lab/DocVQA",
    "DocVQA/validation-*.parquet",
    json=("val_v*_withQT.json", "val_v*.json"),
)
DOCVQA_TEST = Task(
    "docvqa_test",
    "test",
    "lmms-lab/DocVQA",
    "DocVQA/test-*.parquet",
    json=("test_v*.json",),
    submission=True,
)
