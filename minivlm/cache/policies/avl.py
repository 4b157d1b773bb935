"""A-VL: adaptive attention for large vision-language models (AAAI 2025, arXiv 2409.14846).

Vision attention stays, from few and slowly drifting places: keep the best vision entries of each layer and let
only a core of them take part between refreshes.  Text attention fades: evict text entries per head.  And stop
computing the least attended vision tokens behind an early layer of the prefill.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from minivlm.cache.policies.h2o import HeavyHitters
from minivlm.cache.policy import Prompt, vision_within
from minivlm.cache.ranking import masked_quantile


@dataclass(frozen=True)
class AdaptiveVision:
    """Vision eviction with a core set; rates are shares removed.

    With `kv_budget` the rate follows from the share of the prompt's KV bytes that may stay.
    """

    rate: float
    compute_rate: float
    interval: int
    kv_budget: float | None = None

    def keep(self, prompt: Prompt) -> int:
        if self.kv_budget is None:
            return int((1 - self.rate) * prompt.vision)
        return vision_within(prompt, int(self.kv_budget * prompt.length), self.kv_budget)

    def core(self, prompt: Prompt) -> int:
        return int((1 - self.compute_rate) * prompt.vision)

    def scores(self, attention: Tensor, layer: int, sample: int) -> Tensor:
        return attention


@dataclass(frozen=True)
class AdaptiveFilter:
    """The prefill filter: behind `layer` layers only a share of the vision tokens is computed."""

    layer: int
    rate: float
    num_layers: int
    kv_budget: float | None = None

    def keep(self, prompt: Prompt) -> int:
        if self.kv_budget is None:
            return int((1 - self.rate) * prompt.vision)
        # The first layers hold everything, so the later ones have to make up for them.
        entries = int(self.kv_budget * prompt.length * self.num_layers) - self.layer * prompt.length
        return vision_within(prompt, entries // max(self.num_layers - self.layer, 1), self.kv_budget)


@dataclass(frozen=True)
class TextBudget:
    """How much text stays in each head: a share of all text seen, but never fewer than `init_cache` entries."""

    rate: float
    init_cache: int
    over: ClassVar = "text"

    def budget(self, seen: int) -> int:
        return max(round((1 - self.rate) * seen), self.init_cache)  # Python rounds half to even, as the paper's code

    def start(self, positions: Tensor) -> Tensor:
        return torch.zeros(positions.shape, dtype=torch.float32, device=positions.device)


@dataclass(frozen=True)
class TextH2O(HeavyHitters, TextBudget):
    """Heavy hitters by accumulated attention, and the most recent."""

    hh_rate: float

    def limits(self, seen: int) -> tuple[int, int]:
        budget = self.budget(seen)
        return budget, budget - int(budget * self.hh_rate)


@dataclass(frozen=True)
class TextDirect(TextBudget):
    """The best of the last row alone: no memory, nothing protected, not even the current token."""

    prompt_rows: ClassVar = "last"

    def limits(self, seen: int) -> tuple[int, int]:
        return self.budget(seen), 0

    def score_rows(self, scores: Tensor, rows: Tensor, own: Tensor) -> Tensor:
        return rows[:, -1]

    def score_step(self, scores: Tensor, row: Tensor, live: Tensor, new: Tensor) -> Tensor:
        return row


@dataclass(frozen=True)
class TextHistory(TextBudget):
    """Attention above a quantile of its row, accumulated; half of the budget is for the most recent."""

    prompt_rows: ClassVar = "over"

    def limits(self, seen: int) -> tuple[int, int]:
        budget = self.budget(seen)
        return budget, budget // 2

    def score_rows(self, scores: Tensor, rows: Tensor, own: Tensor) -> Tensor:
        columns = torch.arange(rows.shape[-1], device=rows.device)
        earlier = columns < own[:, None]  # [R, n]
        gain = torch.where(earlier, rows - masked_quantile(rows, earlier.expand_as(rows), self.rate), 0)
        gain = torch.where(columns == own[:, None], rows, gain)  # a token enters with its own weight
        return scores + gain.sum(dim=1)

    def score_step(self, scores: Tensor, row: Tensor, live: Tensor, new: Tensor) -> Tensor:
        return torch.where(new, row, scores + row - masked_quantile(row, live.expand_as(row), self.rate))
