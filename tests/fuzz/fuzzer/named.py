"""The defects of the past, each as a case with a name: what was wrong once must not come back."""

from __future__ import annotations

# Each of these adds its cases to the list.
from fuzzer import named_checkpoints, named_files, named_runs  # noqa: F401
from fuzzer.registry import NAMED

__all__ = ["NAMED"]
