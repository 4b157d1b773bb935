"""The static buffers of one decoder layer's KV entries, and where in them what stands.

A row (one sequence) of a layer is laid out around one fixed slot, `tail`:

    ... | vision | system | tail: text, or all that a whole-cache budget decides over | free ...
        ^ first  ^ system_from  ^ tail                                  first unused ^

What stands left of `tail` is aligned to it and never moves; the tail grows to the right.  So all live entries of a
row are one window of slots, and lengths replace masks.  Which vision entries are the core changes from refresh to
refresh: `takes_part` marks them.  A slot says nothing about a position: `position` holds the original one of each entry.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from minivlm.cache.ranking import best_of

BUCKET = 32  # slots; both sides of `tail` are rounded up to it, so at most 2 x 31 slots are slack


def bucket(slots: int) -> int:
    return -(-slots // BUCKET) * BUCKET


@dataclass(frozen=True)
class Row:
    """How many entries of each kind one sequence holds in one layer."""

    vision: int
    core: int  # of the vision entries
    system: int
    tail: int  # after prefill
    capacity: int  # tail entries that the answer can ever need at once

    @property
    def fixed(self) -> int:
        return self.vision + self.system


class Layer:
    """Keys and values [B, H_kv, slots, D], their original positions, and what the policy's parts remember.

    If `indexed`, `core_slots` lists what a core step reads of the slots left of `tail`, for a device that gathers.
    """

    def __init__(
        self,
        rows: list[Row],
        kv_heads: int,
        head_dim: int,
        scored: bool,
        indexed: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.tail, slots = self.extent(rows)
        batch = len(rows)
        self.k = torch.zeros(batch, kv_heads, slots, head_dim, dtype=dtype, device=device)
        self.v = torch.zeros_like(self.k)
        self.position = torch.zeros(batch, kv_heads, slots, dtype=torch.int32, device=device)
        self.score = torch.zeros(batch, kv_heads, slots - self.tail, device=device) if scored else None
        self.vision_row = torch.zeros(
            batch, self.tail, device=device
        )  # a refresh step's attention, mean over query heads
        # 1 for slots that take part in a core step, all from `tail` on included; 0 for secondary vision and what is left of it.
        # Float, not bool: of a bool mask a CPU makes a slower loop.
        self.takes_part = torch.zeros(batch, slots, device=device)
        self.core_slots = (
            torch.zeros(batch, self.core_extent(rows), dtype=torch.int64, device=device) if indexed else None
        )
        self.next_slot = torch.zeros(batch, kv_heads, dtype=torch.int64, device=device)  # where the next token goes
        self.bounds = torch.zeros(3, batch, 1, dtype=torch.int64, device=device)
        self.arrange(rows)

    @staticmethod
    def extent(rows: list[Row]) -> tuple[int, int]:
        """Slots left of the tail, and slots in all, that `rows` need."""
        tail = bucket(max(row.fixed for row in rows))
        return tail, tail + bucket(max(row.capacity for row in rows))

    @staticmethod
    def core_extent(rows: list[Row]) -> int:
        return bucket(max(row.core + row.system for row in rows))

    def fits(self, rows: list[Row], scored: bool) -> bool:
        """Whether the buffers, as they are, are those that `rows` would get."""
        return (
            len(self.k) == len(rows)
            and (self.tail, self.slots) == self.extent(rows)
            and (self.score is not None) == scored
            and (self.core_slots is None or self.core_slots.shape[1] == self.core_extent(rows))
        )

    def arrange(self, rows: list[Row]) -> None:
        """Set the boundaries for `rows`; the entries themselves, and which are the core, are the caller's to write."""
        self.rows = rows
        bounds = [(self.tail - row.fixed, self.tail - row.system, row.core) for row in rows]
        self.bounds.copy_(torch.tensor(bounds).T[..., None])
        self.next_slot.copy_(torch.tensor([[self.tail + row.tail] for row in rows]).expand_as(self.next_slot))

    @property
    def first(self) -> Tensor:  # [B, 1]
        return self.bounds[0]

    @property
    def system_from(self) -> Tensor:  # [B, 1]
        return self.bounds[1]

    @property
    def core_size(self) -> Tensor:  # [B, 1]
        return self.bounds[2]

    @property
    def slots(self) -> int:
        return self.k.shape[2]

    @property
    def nbytes(self) -> int:
        """All that is allocated for this layer: B · (slots · (H_kv · (2·D·itemsize + 4) + 4) + bookkeeping) bytes.

        Bookkeeping: 4 bytes a slot and head right of `tail` for scores where there is a budget, 4 bytes a slot left of
        `tail`, 8 bytes a head for the next slot, 24 bytes for the boundaries, 8 bytes a slot of `core_slots`.
        """
        return sum(t.nbytes for t in self.buffers())

    def buffers(self) -> list[Tensor]:
        held = (
            self.k,
            self.v,
            self.position,
            self.score,
            self.vision_row,
            self.takes_part,
            self.core_slots,
            self.next_slot,
            self.bounds,
        )
        return [t for t in held if t is not None]

    def vision_slots(self, b: int) -> slice:
        """Where row b's vision entries stand, in ascending order of position."""
        row = self.rows[b]
        return slice(self.tail - row.fixed, self.tail - row.system)

    def live_slots(self, b: int, tail: int) -> Tensor:
        """Slots [H_kv, n] of row b's entries, `tail` of them in the tail, in the order of the layout.

        Where the last step evicted, its victim's slot is a hole: the entry in the last used slot stands in for it.
        """
        row, kv_heads = self.rows[b], self.k.shape[1]
        fixed = torch.arange(self.tail - row.fixed, self.tail, device=self.k.device).expand(kv_heads, -1)
        used = torch.arange(self.tail, self.tail + tail, device=self.k.device)
        hole = self.next_slot[b, :, None]  # equal to the first unused slot where there is none
        return torch.cat((fixed, torch.where(used == hole, self.tail + tail, used)), dim=1)

    def mark_core(self, b: int, core: Tensor) -> None:
        """Of row b's vision entries only those of the mask core [vision] take part between refreshes."""
        vision = self.vision_slots(b)
        self.takes_part[b] = (torch.arange(self.slots, device=core.device) >= vision.start).float()
        self.takes_part[b, vision] = core.float()

    def list_core(self) -> None:
        """Bring `core_slots` up to `takes_part`; behind a row's last one slot 0 is repeated."""
        if self.core_slots is not None:
            self.core_slots.copy_(first_slots(self.takes_part[:, : self.tail] > 0, self.core_slots.shape[1]))


def reselect(layers: Sequence[Layer], active: Tensor) -> None:
    """Choose the cores anew by each layer's `vision_row`; rows not `active` [B] keep theirs.

    Layers whose tails begin at the same slot are chosen for at once: many small choices cost far more than a large one.
    """
    for tail, alike in groupby(sorted(layers, key=lambda layer: layer.tail), key=lambda layer: layer.tail):
        group = list(alike)
        slots = torch.arange(tail, device=active.device)
        rows = [
            torch.where((slots >= layer.first) & (slots < layer.system_from), layer.vision_row, -1.0) for layer in group
        ]
        chosen = best_of(torch.stack(rows), torch.stack([layer.core_size for layer in group]))  # [layers, B, tail]
        for layer, core in zip(group, chosen):
            before = layer.takes_part[:, :tail]
            before.copy_(torch.where(active[:, None], (core | (slots >= layer.system_from)).float(), before))
            layer.list_core()


def first_slots(mask: Tensor, count: int) -> Tensor:
    """Indices of the first `count` true entries of each row of mask [B, n]; 0 where there are fewer."""
    rank = (mask.cumsum(dim=1) - 1).clamp(max=count)
    slots = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    found = torch.zeros(len(mask), count + 1, dtype=torch.int64, device=mask.device)
    return found.scatter(1, torch.where(mask, rank, count), slots)[:, :count]
