"""Where the entries of a layer stand: slot arithmetic.

A row (one sequence) of a layer is laid out around one fixed slot, `tail_start`:

    ... | vision | system | tail: text, or everything that a whole-cache budget decides over | free ...
        ^ vision_start    ^ tail_start                                          first unused slot ^

What stands left of `tail_start` is aligned to it and never moves; the tail grows to the right. So the live entries of
a row are one window of slots, and lengths take the place of masks. A slot says nothing about a position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minivlm.cache.counts import EntryCounts

BUCKET = 32  # slots


def bucket(slots: int) -> int:
    """`slots` rounded up, so that prompts of similar size get buffers, and compiled graphs, of the same size."""
    return -(-slots // BUCKET) * BUCKET


@dataclass(frozen=True)
class SlotLayout:
    """How the slots of a layer's buffers are divided, for all rows alike; at most 2 x 31 of them are slack."""

    tail_start: int
    slots: int
    core_width: int  # places in the list of a core step's slots left of `tail_start`

    @classmethod
    def of(cls, rows: Sequence[EntryCounts]) -> SlotLayout:
        """The layout that rows with such counts need."""
        tail_start = bucket(max(counts.fixed for counts in rows))
        slots = tail_start + bucket(max(counts.tail_capacity for counts in rows))
        return cls(tail_start, slots, bucket(max(counts.core + counts.system for counts in rows)))

    def vision(self, counts: EntryCounts) -> slice:
        """A row's vision entries, in ascending order of position."""
        return slice(self.tail_start - counts.fixed, self.tail_start - counts.system)

    def prefilled(self, counts: EntryCounts) -> slice:
        """All entries that a row holds after prefill."""
        return slice(self.tail_start - counts.fixed, self.tail_start + counts.tail)

    def live(self, counts: EntryCounts, tail: int, write_slot: Tensor) -> Tensor:
        """Slots [H_kv, n] of a row's entries, `tail` of them in the tail, in the order of the layout.

        write_slot [H_kv] is where the next token goes. If the last step evicted, that slot is a hole inside the tail;
        then the entry in the last used slot counts in its place.
        """
        device = write_slot.device
        fixed = torch.arange(self.tail_start - counts.fixed, self.tail_start, device=device).expand(len(write_slot), -1)
        used = torch.arange(self.tail_start, self.tail_start + tail, device=device)
        is_hole = used == write_slot[:, None]  # [H_kv, tail]; nowhere if the next token goes to the first unused slot
        return torch.cat((fixed, torch.where(is_hole, self.tail_start + tail, used)), dim=1)


def first_slots(mask: Tensor, count: int) -> Tensor:
    """Indices of the first `count` true entries of each row of mask [B, n]; 0 where there are fewer."""
    rank = (mask.cumsum(dim=1) - 1).clamp(max=count)
    slots = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    listed = torch.zeros(len(mask), count + 1, dtype=torch.int64, device=mask.device)
    return listed.scatter(1, torch.where(mask, rank, count), slots)[:, :count]
