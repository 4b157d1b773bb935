"""Which vision entries are the core: their choice after a refresh, and the list of slots that a core step reads."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from minivlm.cache.ranking import best_of
from minivlm.cache.state import CacheState


def choose_cores(state: CacheState) -> None:
    """Choose the cores anew, by each layer's `vision_attn`; rows that are not active keep theirs."""
    active = state.active[:, None]  # [B, 1]
    for layers, tail_start in _runs(state):
        fixed, system, core, _ = state.counts[:, layers]  # each [layers, B, 1]; the core with the system prefix
        slots = torch.arange(tail_start, device=active.device)
        is_vision = (slots >= tail_start - fixed) & (slots < tail_start - system)  # [layers, B, tail_start]
        attn = torch.stack([buffers.vision_attn for buffers in state.layers[layers]])
        chosen = best_of(torch.where(is_vision, attn, -1.0), core - system)
        now = (chosen | (slots >= tail_start - system)).float()
        for buffers, in_core_step in zip(state.layers[layers], now, strict=True):
            before = buffers.in_core_step[:, :tail_start]
            before.copy_(torch.where(active, in_core_step, before))
    list_cores(state)


def begin_cores(state: CacheState) -> None:
    """After a prefill: note which layers are alike, and list the first cores."""
    tail_starts = [buffers.layout.tail_start for buffers in state.layers]
    ends = [i for i in range(1, len(tail_starts)) if tail_starts[i] != tail_starts[i - 1]]
    state.runs = list(pairwise((0, *ends, len(tail_starts))))
    list_cores(state)


def list_cores(state: CacheState) -> None:
    """Bring `core_slots` up to date with the layers' marks. After a row's last slot, slot 0 is repeated."""
    if state.core_slots is None:
        return
    for layers, tail_start in _runs(state):
        marks = torch.stack([buffers.in_core_step[:, :tail_start] for buffers in state.layers[layers]])
        state.core_slots[layers].copy_(first_slots(marks > 0, state.core_slots.shape[-1]))


def first_slots(mask: Tensor, count: int) -> Tensor:
    """Indices of the first `count` true entries of the last dimension of mask [..., n]; 0 where there are fewer."""
    rank = (mask.cumsum(dim=-1) - 1).clamp(max=count)
    slots = torch.arange(mask.shape[-1], device=mask.device).expand_as(mask)
    listed = torch.zeros(*mask.shape[:-1], count + 1, dtype=torch.int64, device=mask.device)
    return listed.scatter(-1, torch.where(mask, rank, count), slots)[..., :count]


def _runs(state: CacheState) -> Iterator[tuple[slice, int]]:
    """Runs of layers whose tails start at the same slot: many small choices cost far more than a large one."""
    for first, end in state.runs:
        yield slice(first, end), state.layers[first].layout.tail_start
