"""Image entries evicted at random: the baseline that any way of scoring has to beat."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from minivlm.cache.policies.avl import AdaptiveVision, AVLSettings
from minivlm.cache.policy import Candidates, Policy
from minivlm.errors import UserError
from minivlm.transfer import to_device


@dataclass(frozen=True)
class RandomVision(AdaptiveVision):
    """A-VL's counts, with random scores that depend on seed, sample and layer alone, not on the device or the batch."""

    seed: int = 0

    def scores(self, candidates: Candidates) -> Tensor:
        number = (self.seed * 1_000_003 + candidates.sample) * 1_009 + candidates.layer_idx
        generator = torch.Generator().manual_seed(number % 2**63)
        return to_device(torch.rand(candidates.attn.shape, generator=generator), candidates.attn.device)

    def core_scores(self, candidates: Candidates, scores: Tensor) -> Tensor:
        return scores


@dataclass(frozen=True, kw_only=True)
class RandomSettings(AVLSettings):
    """A-VL's settings; only the scores of image entries differ."""

    policy: str = "random"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.vision:
            raise UserError("--policy random without --vision_adaptive_attention has nothing to choose")

    def build(self, num_layers: int) -> Policy:
        selection = RandomVision(**asdict(self.vision_selection()), seed=self.seed)
        return replace(super().build(num_layers), vision=selection)
