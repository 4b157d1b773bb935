"""What holds for any scores: exact order by value and position, and quantiles of what a mask leaves."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from minivlm.cache.ranking import LAST, best_first, best_of, masked_quantile, order_key

TINY = 2.0**-149  # the smallest float32 above 0

floats = st.floats(width=32, allow_nan=False) | st.sampled_from([0.0, -0.0, TINY, -TINY, 0.5])
attention = st.floats(0, 1, width=32) | st.sampled_from([-1.0, 0.0, 0.25, TINY])


@given(st.lists(st.tuples(floats, st.integers(0, 2**31 - 1)), min_size=1, unique_by=lambda entry: entry[1]))
def test_keys_order_by_score_and_then_by_position(entries):
    scores, positions = map(list, zip(*entries, strict=True))
    indices = best_first(torch.tensor(scores, dtype=torch.float32))
    assert indices.tolist() == sorted(range(len(entries)), key=lambda i: (-scores[i], i))
    keys = order_key(torch.tensor(scores, dtype=torch.float32), torch.tensor(positions, dtype=torch.int32))
    assert len(set(keys.tolist())) == len(entries) and int(keys.max()) < LAST


@given(st.lists(attention, min_size=1, max_size=70), st.data())
def test_the_best_are_those_of_a_sort(scores, data):
    count = data.draw(st.integers(0, len(scores) + 2))
    mask = best_of(torch.tensor(scores, dtype=torch.float32), torch.tensor([count]))
    ranked = sorted((i for i, score in enumerate(scores) if score >= 0), key=lambda i: (-scores[i], i))
    assert mask.nonzero()[:, 0].tolist() == sorted(ranked[:count])


@given(st.lists(st.tuples(st.floats(-1e6, 1e6, width=32), st.booleans()), min_size=1), st.floats(0, 1))
def test_a_masked_quantile_is_numpy_s_of_what_is_left(entries, q):
    values, mask = map(list, zip(*entries, strict=True))
    value = masked_quantile(torch.tensor(values), torch.tensor(mask), q).item()
    left = [x for x, keep in entries if keep]
    if not left:
        assert value == 0
        return
    assert min(left) <= value <= max(left)
    spread = max(map(abs, left)) or 1
    assert abs(value - np.quantile(np.array(left, dtype=np.float64), q)) <= 1e-5 * spread
    assert masked_quantile(torch.tensor(values), torch.tensor(mask), 0.0).item() == min(left)
    assert masked_quantile(torch.tensor(values), torch.tensor(mask), 1.0).item() == max(left)
