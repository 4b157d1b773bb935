"""StreamingLLM (ICLR 2024, arXiv 2309.17453): the first few tokens and the most recent, text and image alike.

At original positions: eviction never renumbers here, so the distances the model sees are the true ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from minivlm.cache.policy import Entries, Policy, TokenBudget
from minivlm.cache.settings import CacheSettings

SINKS = 4  # first tokens that always stay


@dataclass(frozen=True)
class Streaming(TokenBudget):
    """The share of all tokens so far that each head may hold."""

    share: float
    over: ClassVar = "all"

    def limits(self, before: int, answer: int) -> tuple[int, int]:
        budget = int((before + answer) * self.share)
        return budget, max(budget - SINKS, 0)

    def first_scores(self, entries: Entries) -> Tensor:
        return (entries.positions < SINKS).float()


@dataclass(frozen=True, kw_only=True)
class StreamingSettings(CacheSettings):
    """Half of the cache where `kv_budget` does not say otherwise, like the H2O baseline."""

    policy: str = "streaming"

    def build(self, num_layers: int) -> Policy:
        return Policy(self.policy, budget=Streaming(0.5 if self.kv_budget is None else self.kv_budget))
