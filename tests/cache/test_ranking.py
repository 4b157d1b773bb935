"""Ranking scores: sorting 64-bit keys and counting bits have to choose the same."""

from __future__ import annotations

import pytest
import torch

from minivlm.cache.ranking import best_first, best_of

N = 57


def best_by_sorting(scores: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """What `best_of` promises, from one plain sort after another."""
    flat = [plain_best(line, n) for line, n in zip(scores.view(-1, N), count.flatten().tolist(), strict=True)]
    return torch.stack(flat).view_as(scores)


def plain_best(scores: torch.Tensor, count: int) -> torch.Tensor:
    """A mask of the `count` best of scores [N] that are not negative; ties go to the lower index."""
    ranked = sorted((i for i in range(N) if scores[i] >= 0), key=lambda i: (-scores[i].item(), i))
    mask = torch.zeros(N, dtype=torch.bool)
    mask[ranked[:count]] = True
    return mask


@pytest.mark.parametrize("values", [2, 5, 10**6], ids=lambda values: f"{values} values")
def test_the_best_by_bits_are_the_best_by_sorting(values):
    """Batched over layers and rows, with a count for each; exact ties, zeros and subnormal numbers occur."""
    generator = torch.Generator().manual_seed(values)
    ranks = torch.randint(0, values, (4, 6, N), generator=generator)
    scores = torch.where(ranks == 0, 0.0, torch.exp(-90.0 * ranks / values))
    scores[torch.rand(scores.shape, generator=generator) < 0.2] = -1.0
    count = torch.randint(0, N, (4, 6, 1), generator=generator)
    count[0, 0] = 0
    count[0, 1] = N  # more than are not negative
    chosen = best_of(scores, count)
    assert torch.equal(chosen, best_by_sorting(scores, count))
    assert not chosen[0, 0].any()
    assert torch.equal(chosen[0, 1], scores[0, 1] >= 0)
    by_key = best_first(scores[2, 3])[: int(count[2, 3])]
    assert set(chosen[2, 3].nonzero()[:, 0].tolist()) == {i for i in by_key.tolist() if scores[2, 3, i] >= 0}


def test_ties_go_to_the_lower_index():
    scores = torch.tensor([0.25, 0.5, 0.25, 0.25, 0.0, 0.0])
    assert best_of(scores, torch.tensor([2])).tolist() == [True, True, False, False, False, False]
    assert best_of(scores, torch.tensor([5])).tolist() == [True, True, True, True, True, False]
    assert best_first(scores).tolist() == [1, 0, 2, 3, 4, 5]
