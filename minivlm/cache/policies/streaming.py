"""StreamingLLM (ICLR 2024, arXiv 2309.17453): the first few tokens and the most recent, text and vision alike.

At original positions: eviction never renumbers here, so the distances the model sees are the true ones.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from minivlm.cache.policy import Policy

SINKS = 4


@dataclass(frozen=True)
class Streaming:
    share: float  # of all tokens seen
    over: ClassVar = "all"
    prompt_rows: ClassVar = "none"

    def limits(self, seen: int) -> tuple[int, int]:
        budget = int(seen * self.share)
        return budget, max(budget - SINKS, 0)

    def start(self, positions: Tensor) -> Tensor:
        return (positions < SINKS).float()

    def score_step(self, scores: Tensor, row: Tensor, live: Tensor, new: Tensor) -> Tensor:
        return torch.where(new, 0, scores)


def adapt(policy: Policy, share: float | None, seed: int) -> Policy:
    """Half of the cache where no `share` is asked for, as the H2O baseline has it."""
    return replace(policy, budget=Streaming(0.5 if share is None else share))
