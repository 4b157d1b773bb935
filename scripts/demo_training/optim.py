"""Muon (Jordan et al. 2024) for the matrices of the transformer layers, AdamW for everything else.

Muon replaces the momentum of a matrix by the nearest semi-orthogonal matrix, which five
Newton-Schulz steps find. The result is scaled to the root mean square of an Adam step, so that one
learning rate serves both optimisers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn


def orthogonalise(matrices: Tensor) -> Tensor:
    """Return the semi-orthogonal factors of matrices [M, rows, cols], iterated in bfloat16."""
    x = matrices.bfloat16()
    flip = x.shape[1] > x.shape[2]
    x = x.mT if flip else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.mT if flip else x).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised. Matrices of the same shape are processed together."""

    def __init__(self, groups: Iterable[dict], lr: float, momentum: float = 0.95, weight_decay: float = 0.01) -> None:
        super().__init__(groups, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    by_shape[p.shape].append(p)
            for shape, params in by_shape.items():
                updates = []
                for p in params:
                    momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    momentum.lerp_(p.grad, 1 - group["momentum"])
                    updates.append(p.grad.lerp(momentum, group["momentum"]))
                scale = 0.2 * max(shape) ** 0.5 * group["lr"]
                for p, update in zip(params, orthogonalise(torch.stack(updates)), strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=scale)


def build_optimisers(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon and AdamW for a model.

    A group's key "tower" says whether it belongs to the vision tower.
    """
    groups = {(muon, tower): [] for muon in (True, False) for tower in (True, False)}
    for name, p in model.named_parameters():
        groups[p.ndim == 2 and ".layers." in name, "vision_tower" in name].append(p)
    sets = [[dict(params=groups[muon, tower], tower=tower) for tower in (True, False)] for muon in (True, False)]
    return [
        Muon(sets[0], lr=1e-3),
        torch.optim.AdamW(sets[1], lr=1e-3, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]
