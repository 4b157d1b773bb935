"""The real cache against the list-based re-statement of A-VL, on random models, prompts and settings."""

from __future__ import annotations

import pytest

from avl_cases import random_case, run_reference
from cache_helpers import compare, replay

SEEDS = range(0, 300)


@pytest.mark.parametrize("block", range(10))
def test_random_cases(block: int) -> None:
    for seed in SEEDS[block::10]:
        case = random_case(seed)
        ref = run_reference(case)
        compare(replay(case, ref.tokens), ref)
