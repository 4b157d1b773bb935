"""Ordering scores the way A-VL states it: higher first, ties to the lower position, decided in float32."""

from __future__ import annotations

import torch
from torch import Tensor

LAST = torch.iinfo(torch.int64).max  # the key of what must not be evicted: no score gives a larger one
_TOP = torch.iinfo(torch.int32).max


def order_key(scores: Tensor, positions: Tensor) -> Tensor:
    """int64 keys, larger is better: float32 scores first, then the lower of two positions (< 2**31).

    One comparison of such keys decides exactly, whatever order the slots are in.
    """
    bits = (scores + 0.0).view(torch.int32)  # + 0.0 makes -0.0 the equal of 0.0
    bits = bits ^ ((bits >> 31) & _TOP)  # two's complement order is now float order
    return (bits.long() << 32) | (_TOP - positions.long())


def best_first(scores: Tensor) -> Tensor:
    """Indices that sort the last dimension best first; ties to the lower index."""
    return scores.argsort(dim=-1, descending=True, stable=True)


def best_of(scores: Tensor, count: Tensor) -> Tensor:
    """A mask of the `count` [..., 1] best of float32 scores [..., n]; ties to the lower index, never a negative score.

    The bits of scores from 0 up are ordered as they are. The count-th largest is found bit by bit: 31 counts over all
    rows at once, and no sort.
    """
    bits = scores.view(torch.int32)
    threshold = torch.zeros_like(count, dtype=torch.int32)
    for bit in reversed(range(31)):
        higher = threshold | (1 << bit)
        threshold = torch.where(
            (bits >= higher).sum(dim=-1, keepdim=True, dtype=torch.int32) >= count, higher, threshold
        )
    better, equal = bits > threshold, bits == threshold
    room = count - better.sum(dim=-1, keepdim=True)
    return better | (equal & (equal.cumsum(dim=-1, dtype=torch.int32) <= room))


def masked_quantile(values: Tensor, mask: Tensor, q: float) -> Tensor:
    """The q-quantile, linearly interpolated, of the masked values of the last dimension: [..., n] -> [..., 1].

    Rows without any value give 0.
    """
    ordered = torch.where(mask, values, torch.inf).sort(dim=-1).values
    last = (mask.sum(dim=-1, keepdim=True) - 1).clamp(min=0).expand(*ordered.shape[:-1], 1)
    rank = last.double() * q
    below = rank.long()
    low, high = ordered.gather(-1, below), ordered.gather(-1, torch.minimum(below + 1, last))
    value = torch.lerp(low, high, (rank - below).to(values.dtype))
    return torch.where(mask.any(dim=-1, keepdim=True), value, 0)
