"""The buffers of one layer: keys, values, and what the policy's parts remember of each entry."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from minivlm.cache.counts import EntryCounts
from minivlm.cache.ranking import best_of
from minivlm.cache.slots import SlotLayout, first_slots


class LayerBuffers:
    """Static tensors of one layer. Their slots are laid out as `SlotLayout` says.

    `scored`: a token budget keeps a score of each tail entry. `indexed`: `core_slots` lists the slots left of the
    tail that a core step reads, for a device that gathers.
    """

    def __init__(
        self,
        counts: Sequence[EntryCounts],
        kv_heads: int,
        head_dim: int,
        *,
        scored: bool,
        indexed: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.layout = SlotLayout.of(counts)
        batch, slots, tail_start = len(counts), self.layout.slots, self.layout.tail_start

        def zeros(*shape: int, of: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(*shape, dtype=of, device=device)

        self.k = zeros(batch, kv_heads, slots, head_dim, of=dtype)
        self.v = zeros(batch, kv_heads, slots, head_dim, of=dtype)
        self.position = zeros(batch, kv_heads, slots, of=torch.int32)  # the original one of each entry
        self.score = zeros(batch, kv_heads, slots - tail_start) if scored else None  # of tail entries
        self.vision_attn = zeros(batch, tail_start)  # of the last refresh, mean over query heads
        # 1 for the slots of a core step: the core, the system prefix, and everything from `tail_start` on; 0 for the
        # other vision entries. Float, because a CPU makes a slower loop of a bool mask.
        self.in_core_step = zeros(batch, slots)
        self.core_slots = zeros(batch, self.layout.core_width, of=torch.int64) if indexed else None
        self.write_slot = zeros(batch, kv_heads, of=torch.int64)  # where the next token goes
        self._bounds = zeros(3, batch, 1, of=torch.int64)
        self.arrange(counts)

    def fits(self, counts: Sequence[EntryCounts], scored: bool) -> bool:
        """Whether these buffers, as they are, are those that rows with such counts would get."""
        layout = SlotLayout.of(counts)
        return (
            len(self.k) == len(counts)
            and (self.layout.tail_start, self.layout.slots) == (layout.tail_start, layout.slots)
            and (self.score is not None) == scored
            and (self.core_slots is None or self.core_slots.shape[1] == layout.core_width)
        )

    def arrange(self, counts: Sequence[EntryCounts]) -> None:
        """Set the bounds of each row. The caller writes the entries, and which of them are the core."""
        self.counts = counts
        start = self.layout.tail_start
        bounds = [(start - each.fixed, start - each.system, each.core) for each in counts]
        self._bounds.copy_(torch.tensor(bounds).T[..., None])
        self.write_slot.copy_(torch.tensor([[start + each.tail] for each in counts]).expand_as(self.write_slot))

    @property
    def vision_start(self) -> Tensor:
        """Each row's first live slot [B, 1]."""
        return self._bounds[0]

    @property
    def system_start(self) -> Tensor:
        """The slot [B, 1] after each row's last vision entry."""
        return self._bounds[1]

    @property
    def core_size(self) -> Tensor:
        """Entries [B, 1] in each row's core."""
        return self._bounds[2]

    @property
    def nbytes(self) -> int:
        """Everything allocated: B · (slots · (H_kv · (2·D·itemsize + 4) + 4) + bookkeeping) bytes.

        Bookkeeping: 4 bytes a slot and head of the tail for scores, if there is a budget; 4 bytes a slot left of the
        tail; 8 bytes a head for the slot of the next token; 24 bytes for the bounds; 8 bytes a place of `core_slots`.
        """
        return sum(tensor.nbytes for tensor in self.tensors())

    def tensors(self) -> list[Tensor]:
        """Everything that a decode step reads or writes."""
        optional = [tensor for tensor in (self.score, self.core_slots) if tensor is not None]
        return [
            self.k,
            self.v,
            self.position,
            self.vision_attn,
            self.in_core_step,
            self.write_slot,
            self._bounds,
            *optional,
        ]

    def mark_core(self, row: int, core: Tensor) -> None:
        """Let only the entries of the mask core [vision] of a row's vision entries take part in core steps."""
        vision = self.layout.vision(self.counts[row])
        self.in_core_step[row] = (torch.arange(self.layout.slots, device=core.device) >= vision.start).float()
        self.in_core_step[row, vision] = core.float()

    def list_core(self) -> None:
        """Bring `core_slots` up to date with `in_core_step`. After a row's last slot, slot 0 is repeated."""
        if self.core_slots is not None:
            in_core_step = self.in_core_step[:, : self.layout.tail_start] > 0
            self.core_slots.copy_(first_slots(in_core_step, self.core_slots.shape[1]))


def choose_cores(layers: Sequence[LayerBuffers], active: Tensor) -> None:
    """Choose the cores anew, by each layer's `vision_attn`; rows that are not `active` [B] keep theirs.

    Layers whose tails start at the same slot are done together: many small choices cost far more than a large one.
    """

    def tail_start(buffers: LayerBuffers) -> int:
        return buffers.layout.tail_start

    for start, alike in groupby(sorted(layers, key=tail_start), key=tail_start):
        group = list(alike)
        slots = torch.arange(start, device=active.device)
        attn = []
        for buffers in group:
            is_vision = (slots >= buffers.vision_start) & (slots < buffers.system_start)
            attn.append(torch.where(is_vision, buffers.vision_attn, -1.0))  # [B, start]
        cores = best_of(torch.stack(attn), torch.stack([buffers.core_size for buffers in group]))  # [layers, B, start]
        for buffers, core in zip(group, cores, strict=True):
            before = buffers.in_core_step[:, :start]
            now = (core | (slots >= buffers.system_start)).float()
            before.copy_(torch.where(active[:, None], now, before))
            buffers.list_core()
