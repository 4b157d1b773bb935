"""H2O, heavy-hitter oracle (NeurIPS 2023, arXiv 2306.14048), over the whole cache: text and image alike.

The baseline as A-VL's code has it: at each step a share of all tokens so far may stay, a quarter of that by
accumulated attention over all queries, three quarters the most recent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from minivlm.cache.policy import TokenBudget


class HeavyHitters(TokenBudget):
    """Scores that are attention accumulated over all queries so far, without decay."""

    def prompt_queries(self) -> Literal["all"]:
        return "all"

    def score_prompt(self, scores: Tensor, attn: Tensor, own: Tensor) -> Tensor:
        return scores + attn.sum(dim=1)

    def score_step(self, scores: Tensor, attn: Tensor, live: Tensor, new: Tensor) -> Tensor:
        return scores + attn


@dataclass(frozen=True)
class WholeCacheH2O(HeavyHitters):
    """The share of all tokens so far that each head may hold."""

    share: float
    over: ClassVar = "all"

    def limits(self, before: int, answer: int) -> tuple[int, int]:
        seen = before + answer
        recent = int(seen * self.share * 0.75)
        return int(seen * self.share * 0.25) + recent, recent
