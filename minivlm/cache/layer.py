"""The static buffers of one decoder layer's KV entries, and where in them what stands.

A row (one sequence) of a layer is laid out around one fixed slot, `tail`:

    ... | secondary vision | core vision | system | tail: text, or all that a whole-cache budget decides over | free ...
        ^ first            ^ core_from   ^ system_from  ^ tail                                  first unused ^

What stands left of `tail` is aligned to it and never grows; the tail grows to the right.  So all live entries of a
row are one window of slots, those that a core step reads are a window as well, and lengths replace masks.  A slot
says nothing about a position: `position` holds the original one of each entry.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from minivlm.cache.ranking import order_key

BUCKET = 32  # slots; both sides of `tail` are rounded up to it, so at most 2 x 31 slots are slack


def bucket(slots: int) -> int:
    return -(-slots // BUCKET) * BUCKET


@dataclass(frozen=True)
class Row:
    """How many entries of each kind one sequence holds in one layer."""

    secondary: int
    core: int
    system: int
    tail: int  # after prefill
    capacity: int  # tail entries that the answer can ever need at once

    @property
    def fixed(self) -> int:
        return self.secondary + self.core + self.system


class Layer:
    """Keys and values [B, H_kv, slots, D], their original positions, and what the token budget remembers."""

    def __init__(self, rows: list[Row], kv_heads: int, head_dim: int, scored: bool, dtype: torch.dtype, device: torch.device) -> None:
        self.tail, slots = self.extent(rows)
        batch = len(rows)
        self.k = torch.zeros(batch, kv_heads, slots, head_dim, dtype=dtype, device=device)
        self.v = torch.zeros_like(self.k)
        self.position = torch.zeros(batch, kv_heads, slots, dtype=torch.int32, device=device)
        self.score = torch.zeros(batch, kv_heads, slots - self.tail, device=device) if scored else None
        self.vision_row = torch.zeros(batch, self.tail, device=device)  # a refresh step's attention, mean over query heads
        self.next_slot = torch.zeros(batch, kv_heads, dtype=torch.int64, device=device)  # where the next token goes
        self.bounds = torch.zeros(3, batch, 1, dtype=torch.int64, device=device)
        self.arrange(rows)

    @staticmethod
    def extent(rows: list[Row]) -> tuple[int, int]:
        """Slots left of the tail, and slots in all, that `rows` need."""
        tail = bucket(max(row.fixed for row in rows))
        return tail, tail + bucket(max(row.capacity for row in rows))

    def fits(self, rows: list[Row], scored: bool) -> bool:
        """Whether the buffers, as they are, are those that `rows` would get."""
        return len(self.k) == len(rows) and (self.tail, self.k.shape[2]) == self.extent(rows) and (self.score is not None) == scored

    def arrange(self, rows: list[Row]) -> None:
        """Set the boundaries for `rows`; the entries themselves are the caller's to write."""
        self.rows = rows
        self.core_window = self.tail - bucket(max(row.core + row.system for row in rows))  # where a core step's reading starts
        first = [self.tail - row.fixed for row in rows]
        system_from = [self.tail - row.system for row in rows]
        core_from = [start - row.core for start, row in zip(system_from, rows)]
        self.bounds.copy_(torch.tensor([first, core_from, system_from])[..., None])
        self.next_slot.copy_(torch.tensor([[self.tail + row.tail] for row in rows]).expand_as(self.next_slot))

    @property
    def first(self) -> Tensor:  # [B, 1]
        return self.bounds[0]

    @property
    def core_from(self) -> Tensor:  # [B, 1]
        return self.bounds[1]

    @property
    def system_from(self) -> Tensor:  # [B, 1]
        return self.bounds[2]

    @property
    def slots(self) -> int:
        return self.k.shape[2]

    @property
    def nbytes(self) -> int:
        """All that is allocated for this layer: B · (slots · H_kv · (2·D·itemsize + 4) + bookkeeping) bytes.

        Bookkeeping: 4 bytes a slot and head right of `tail` for scores where there is a budget, 4 bytes a slot left of
        `tail`, 8 bytes a head for the next slot, 24 bytes for the boundaries.
        """
        return sum(t.nbytes for t in self.buffers())

    def buffers(self) -> list[Tensor]:
        held = (self.k, self.v, self.position, self.score, self.vision_row, self.next_slot, self.bounds)
        return [t for t in held if t is not None]

    def live_slots(self, b: int, tail: int) -> Tensor:
        """Slots [H_kv, n] of row b's entries, `tail` of them in the tail, in the order of the layout.

        Where the last step evicted, its victim's slot is a hole: the entry in the last used slot stands in for it.
        """
        row, kv_heads = self.rows[b], self.k.shape[1]
        fixed = torch.arange(self.tail - row.fixed, self.tail, device=self.k.device).expand(kv_heads, -1)
        used = torch.arange(self.tail, self.tail + tail, device=self.k.device)
        hole = self.next_slot[b, :, None]  # equal to the first unused slot where there is none
        return torch.cat((fixed, torch.where(used == hole, self.tail + tail, used)), dim=1)

    def reselect(self, active: Tensor) -> None:
        """Choose the cores anew by `vision_row` and swap what enters with what leaves, so that they stay contiguous.

        Rows not `active` [B] keep theirs.  On a CPU only the rows that change are moved; elsewhere asking for their
        number would make the host wait, so as many as ever could are moved, the surplus onto itself.
        """
        batch = len(self.rows)
        slots = torch.arange(self.tail, device=self.k.device).expand(batch, -1)  # [B, tail]
        vision = (slots >= self.first) & (slots < self.system_from)
        core = vision & (slots >= self.core_from)
        key = torch.where(vision, order_key(self.vision_row, self.position[:, 0, : self.tail]), torch.iinfo(torch.int64).min)
        ranked = slots < self.system_from - self.core_from  # the first n_core ranks
        chosen = torch.zeros_like(core).scatter(1, key.argsort(dim=1, descending=True), ranked)
        leaving, entering = core & ~chosen & active[:, None], chosen & ~core & active[:, None]
        count = leaving.sum(dim=1, keepdim=True)
        most = int(count.max()) if self.k.device.type == "cpu" else max(min(row.core, row.secondary) for row in self.rows)
        if most == 0:
            return
        surplus = torch.arange(most, device=count.device) >= count  # repeats pair 0, or slot 0 with itself
        out, into = (first_slots(mask, most) for mask in (leaving, entering))
        out, into = (torch.where(surplus, index[:, :1], index) for index in (out, into))
        b, kv_heads = torch.arange(batch, device=out.device)[:, None], self.k.shape[1]
        lines = (b * kv_heads + torch.arange(kv_heads, device=out.device))[..., None] * self.slots  # [B, H_kv, 1]
        moved = [(lines + index[:, None]).flatten() for index in (out, into)]
        for held in (self.k.view(-1, self.k.shape[3]), self.v.view(-1, self.v.shape[3]), self.position.view(-1)):
            swap(held, *moved)
        swap(self.vision_row.view(-1), *((b * self.tail + index).flatten() for index in (out, into)))


def swap(held: Tensor, out: Tensor, into: Tensor) -> None:
    """Exchange rows `out` and `into` of held [rows, ...]; whole rows are copied, which index assignment would not do."""
    kept = held.index_select(0, out)
    held.index_copy_(0, out, held.index_select(0, into))
    held.index_copy_(0, into, kept)


def first_slots(mask: Tensor, count: int) -> Tensor:
    """Indices of the first `count` true entries of each row of mask [B, n]; 0 where there are fewer."""
    rank = (mask.cumsum(dim=1) - 1).clamp(max=count)
    slots = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    found = torch.zeros(len(mask), count + 1, dtype=torch.int64, device=mask.device)
    return found.scatter_(1, torch.where(mask, rank, count), slots)[:, :count]
