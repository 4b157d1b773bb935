"""Vision eviction at random: the baseline that any way of scoring has to beat."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from minivlm.cache.policies.avl import AdaptiveVision
from minivlm.cache.policy import Policy


@dataclass(frozen=True)
class RandomVision(AdaptiveVision):
    """As A-VL's, with random scores that depend on seed, sample and layer alone, not on the device or the batch."""

    seed: int = 0

    def scores(self, attention: Tensor, layer: int, sample: int) -> Tensor:
        generator = torch.Generator().manual_seed(((self.seed * 1_000_003 + sample) * 1_009 + layer) % 2**63)
        return torch.rand(attention.shape, generator=generator).to(attention.device)


def adapt(policy: Policy, share: float | None, seed: int) -> Policy:
    """The flags' own vision selection, with random scores."""
    return replace(policy, vision=RandomVision(**asdict(policy.vision), seed=seed))
