"""Small policies that use those features of the contract that no shipped policy uses.

They have parts that differ from layer to layer, scores from keys, filters at several layers and before the decoder, and
a budget that evicts only once, in each head by itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from minivlm.cache import CacheSettings, Candidates, Entries, Policy, Prompt, TokenBudget, VisionCounts, setting


@dataclass(frozen=True)
class Window(TokenBudget):
    """Evicts once, at prefill (as SnapKV): the last tokens stay, and the entries that they attend to most.

    Attention is pooled over neighbouring entries first.
    """

    capacity: int
    window: int
    pool: int
    over: ClassVar = "all"

    def limits(self, before: int, answer: int) -> tuple[int, int]:
        return min(before, self.capacity) + answer, min(before, self.window) + answer

    def prompt_queries(self) -> int:
        return self.window

    def score_prompt(self, scores: Tensor, attn: Tensor, own: Tensor) -> Tensor:
        return F.max_pool1d(attn.sum(dim=1), self.pool, stride=1, padding=self.pool // 2)  # [H_kv, n]


@dataclass(frozen=True)
class SmallKeys(TokenBudget):
    """Keeps the entries whose keys have the smallest norm, at every step."""

    share: float
    over: ClassVar = "all"

    def limits(self, before: int, answer: int) -> tuple[int, int]:
        return int((before + answer) * self.share), 0

    def first_scores(self, entries: Entries) -> Tensor:
        return -entries.keys.float().norm(dim=-1)


@dataclass(frozen=True)
class SmallVisionKeys:
    """Keeps the image entries whose keys have the smallest norm, averaged over heads; chooses the core by attention."""

    share: float
    interval: int = 3

    def counts(self, prompt: Prompt) -> VisionCounts:
        return VisionCounts(keep=int(self.share * prompt.vision), core=int(self.share * prompt.vision) // 2)

    def scores(self, candidates: Candidates) -> Tensor:
        return -candidates.keys.float().norm(dim=-1).mean(dim=0)

    def core_scores(self, candidates: Candidates, scores: Tensor) -> Tensor:
        return candidates.attn


@dataclass(frozen=True)
class ShareFilter:
    """Lets only a share of the image tokens go on: those with the most attention."""

    layer: int
    share: float

    def keep(self, prompt: Prompt) -> int:
        return int(self.share * prompt.vision)

    def scores(self, candidates: Candidates) -> Tensor:
        return candidates.attn


@dataclass(frozen=True)
class Diverse:
    """Lets image tokens in that are far from one another (as DivPrune).

    Each choice is the token whose nearest chosen token is the farthest away.
    """

    share: float

    def keep(self, prompt: Prompt) -> int:
        return int(self.share * prompt.vision)

    def scores(self, embeds: Tensor, count: int) -> Tensor:
        unit = F.normalize(embeds.float(), dim=-1)
        distance = 1 - unit @ unit.T  # [N, N]
        scores = torch.full((len(embeds),), -torch.inf, device=embeds.device)
        nearest = distance.sum(dim=1)  # the first choice is the token farthest from all others
        for rank in range(count):
            best = nearest.masked_fill(scores > -torch.inf, -torch.inf).argmax()
            scores[best] = -float(rank)
            nearest = distance[best] if rank == 0 else torch.minimum(nearest, distance[best])
        return scores


@dataclass(frozen=True, kw_only=True)
class PyramidWindowSettings(CacheSettings):
    """A budget whose capacity falls from layer to layer (as PyramidKV)."""

    policy: str = "pyramid window"
    capacity: int = setting(24, "entries of the prompt that a head holds in the first layer")
    window: int = setting(4, "last tokens of the prompt, whose attention scores the others")

    def layer_capacity(self, layer_idx: int) -> int:
        return self.capacity - 6 * layer_idx

    def build(self, num_layers: int) -> Policy:
        budgets = tuple(Window(self.layer_capacity(layer_idx), self.window, 3) for layer_idx in range(num_layers))
        return Policy(self.policy, budget=budgets)


@dataclass(frozen=True, kw_only=True)
class DropSettings(CacheSettings):
    """Drops image tokens before the decoder and after two layers; each layer keeps only some of those that reach it."""

    policy: str = "drop"

    def vision_share(self, layer_idx: int) -> float:
        return (0.72, 0.4, 0.25)[min(layer_idx, 2)]

    def build(self, num_layers: int) -> Policy:
        return Policy(
            self.policy,
            vision=tuple(SmallVisionKeys(self.vision_share(layer_idx)) for layer_idx in range(num_layers)),
            filters=(ShareFilter(1, 0.6), ShareFilter(2, 0.3))[: max(num_layers - 1, 0)],
            inputs=Diverse(0.8),
        )
