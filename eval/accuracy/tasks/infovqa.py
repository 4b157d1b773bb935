"""InfographicVQA (Mathew et al., WACV 2022): questions about infographics, scored by ANLS."""

from eval.accuracy.tasks.base import Task

INFOVQA_VAL = Task(
    "infovqa_val",
    "validation",
    "lmms-lab/DocVQA",
    "InfographicVQA/validation-*.parquet",
    json=("infographicsVQA_val_v*_withQT.json", "infographicsVQA_val_v*.json"),
)
