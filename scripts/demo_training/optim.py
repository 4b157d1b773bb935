"""Muon (Jordan et al. 2024) for the matrices of the transformer layers, AdamW for everything else.

Muon replaces the momentum of a matrix by the nearest semi-orthogonal matrix, which five
Newton-Schulz steps find. The result is scaled to the root mean square of an Adam step, so that one
learning rate serves both optimisers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

from demo_training.model import DemoTrainer
from weights.layout import part_rows


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
    """Nesterov momentum, orthogonalised. Matrices of the same shape are processed together.

    A group's key "rows" has the numbers of rows of the matrices that are one below the other in each
    of its parameters. If it is empty, a parameter is one matrix.
    """

    def __init__(self, groups: Iterable[dict], lr: float, momentum: float = 0.95, weight_decay: float = 0.01) -> None:
        super().__init__(groups, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    momentum.lerp_(p.grad, 1 - group["momentum"])
                    update = p.grad.lerp(momentum, group["momentum"])
                    rows = group["rows"] or (len(p),)
                    for pair in zip(p.split(rows), update.split(rows), strict=True):
                        by_shape[pair[0].shape].append(pair)
            for shape, pairs in by_shape.items():
                matrices, updates = zip(*pairs, strict=True)
                scale = 0.2 * max(shape) ** 0.5 * group["lr"]
                for matrix, update in zip(matrices, orthogonalise(torch.stack(updates)), strict=True):
                    matrix.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=scale)


def build_optimisers(model: DemoTrainer) -> list[torch.optim.Optimizer]:
    """Muon and AdamW for a model.

    A group's key "tower" says whether it belongs to the vision tower.
    """
    matrices, rest = defaultdict(list), defaultdict(list)
    for name, p in model.named_parameters():
        tower = "vision_tower" in name
        if p.ndim == 2 and ".layers." in name:
            matrices[tower, tuple(part_rows(name, model.config.text).values())].append(p)
        else:
            rest[tower].append(p)
    return [
        Muon([dict(params=params, tower=tower, rows=rows) for (tower, rows), params in matrices.items()], lr=1e-3),
        torch.optim.AdamW(
            [dict(params=params, tower=tower) for tower, params in rest.items()],
            lr=1e-3,
            betas=(0.9, 0.98),
            weight_decay=0.0,
            fused=True,
        ),
    ]
