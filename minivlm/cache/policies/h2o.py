"""H2O, heavy-hitter oracle (NeurIPS 2023, arXiv 2306.14048), over the whole cache: text and vision alike.

The baseline as A-VL's code has it: at each step a share of everything seen may stay, a quarter of that by
accumulated attention over all queries, three quarters the most recent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


class HeavyHitters:
    """Scores of a token budget that are attention accumulated over all queries so far, without decay."""

    prompt_rows: ClassVar = "over"

    def start(self, positions: Tensor) -> Tensor:
        return torch.zeros(positions.shape, dtype=torch.float32, device=positions.device)

    def score_rows(self, scores: Tensor, rows: Tensor, own: Tensor) -> Tensor:
        return scores + rows.sum(dim=1)

    def score_step(self, scores: Tensor, row: Tensor, live: Tensor, new: Tensor) -> Tensor:
        return torch.where(new, 0, scores) + row


@dataclass(frozen=True)
class WholeCacheH2O(HeavyHitters):
    share: float  # of all tokens seen
    over: ClassVar = "all"

    def limits(self, seen: int) -> tuple[int, int]:
        recent = int(seen * self.share * 0.75)
        return int(seen * self.share * 0.25) + recent, recent
