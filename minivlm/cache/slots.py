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
LARGE_BUCKET = 256  # slots, where few sizes are worth more than a little slack


def bucket(slots: int, size: int = BUCKET) -> int:
    """`slots` rounded up, so that prompts of similar size get buffers of the same size."""
    return -(-slots // size) * size


@dataclass(frozen=True)
class SlotLayout:
    """How the slots of a layer's buffers are divided, for all rows alike."""

    tail_start: int
    tail: int  # slots from `tail_start` on

    @classmethod
    def of(cls, rows: Sequence[EntryCounts], size: int = BUCKET) -> SlotLayout:
        """The layout that rows with such counts need, in buckets of `size` slots."""
        fixed = max(counts.fixed for counts in rows)
        return cls(bucket(fixed, size), bucket(max(counts.tail_capacity for counts in rows), size))

    @property
    def slots(self) -> int:
        """All of them."""
        return self.tail_start + self.tail

    def grown(self, needed: SlotLayout) -> SlotLayout:
        """The smallest layout that holds what either does."""
        return SlotLayout(max(self.tail_start, needed.tail_start), max(self.tail, needed.tail))

    def vision(self, counts: EntryCounts) -> slice:
        """A row's vision entries, in ascending order of position."""
        return slice(self.tail_start - counts.fixed, self.tail_start - counts.system)

    def prefilled(self, counts: EntryCounts) -> slice:
        """All entries that a row holds after prefill."""
        return slice(self.tail_start - counts.fixed, self.tail_start + counts.tail)

    def live(self, counts: EntryCounts, tail: int, next_place: Tensor) -> Tensor:
        """Slots [H_kv, n] of a row's entries, `tail` of them in the tail, in the order of the layout.

        next_place [H_kv] is where in the tail the next token goes. If the last step evicted, that is a hole; then the
        entry in the last used slot counts in its place.
        """
        device = next_place.device
        fixed = torch.arange(self.tail_start - counts.fixed, self.tail_start, device=device).expand(len(next_place), -1)
        places = torch.arange(tail, device=device)
        is_hole = places == next_place[:, None]  # [H_kv, tail]; nowhere if the next token goes to the first unused slot
        return torch.cat((fixed, self.tail_start + torch.where(is_hole, tail, places)), dim=1)
