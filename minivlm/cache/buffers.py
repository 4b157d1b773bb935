"""The buffers of one layer: keys, values, and what the policy's parts remember of each entry."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from minivlm.cache.counts import EntryCounts
from minivlm.cache.slots import SlotLayout


class LayerBuffers:
    """Static tensors of one layer. Their slots are laid out as `SlotLayout` says.

    `scored`: a token budget keeps a score of each tail entry.
    """

    def __init__(
        self,
        layout: SlotLayout,
        batch: int,
        kv_heads: int,
        head_dim: int,
        *,
        scored: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.layout = layout
        self.counts: Sequence[EntryCounts] = ()  # of each row
        slots, tail_start = layout.slots, layout.tail_start

        def zeros(*shape: int, of: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(*shape, dtype=of, device=device)

        self.k = zeros(batch, kv_heads, slots, head_dim, of=dtype)
        self.v = zeros(batch, kv_heads, slots, head_dim, of=dtype)
        self.position = zeros(batch, kv_heads, slots, of=torch.int32)  # the original one of each entry
        self.score = zeros(batch, kv_heads, layout.tail) if scored else None  # of tail entries
        self.vision_attn = zeros(batch, tail_start)  # of the last refresh, mean over query heads
        # 1 for the slots of a core step: the core, the system prefix, and everything from `tail_start` on; 0 for the
        # other vision entries. Float, because a CPU makes a slower loop of a bool mask.
        self.in_core_step = zeros(batch, slots)

    @property
    def nbytes(self) -> int:
        """Everything allocated: B · (slots · (H_kv · (2·D·itemsize + 4) + 4) + bookkeeping) bytes.

        Bookkeeping: 4 bytes a slot and head of the tail for scores, if there is a budget; 4 bytes a slot left of the
        tail.
        """
        return sum(tensor.nbytes for tensor in self.tensors())

    def tensors(self) -> list[Tensor]:
        """Everything that a decode step reads or writes."""
        score = [] if self.score is None else [self.score]
        return [self.k, self.v, self.position, self.vision_attn, self.in_core_step, *score]

    def within(self, layout: SlotLayout) -> dict[str, Tensor]:
        """By name, the tensors that buffers of a smaller layout would hold instead of these."""
        first = self.layout.tail_start - layout.tail_start
        slots = slice(first, first + layout.slots)
        score = {} if self.score is None else {"score": self.score[:, :, : layout.tail]}
        return {
            "k": self.k[:, :, slots],
            "v": self.v[:, :, slots],
            "position": self.position[:, :, slots],
            "vision_attn": self.vision_attn[:, first:],
            "in_core_step": self.in_core_step[:, slots],
            **score,
        }

    def mark_kept(self, rows: slice, fixed: Tensor) -> None:
        """Let all entries of some rows take part in core steps; fixed [B, 1] counts those left of the tail."""
        slots = torch.arange(self.layout.slots, device=fixed.device)
        self.in_core_step[rows] = (slots >= self.layout.tail_start - fixed[rows]).float()

    def mark_core(self, row: int, core: Tensor) -> None:
        """Of a row's vision entries, let only those of the mask core [vision] take part in core steps."""
        self.in_core_step[row, self.layout.vision(self.counts[row])] = core.float()
