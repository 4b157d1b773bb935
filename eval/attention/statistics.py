"""The analysis behind A-VL (AAAI 2025, arXiv 2409.14846), of any answers.

- Concordance: |T1 and T2| / (p · N) of the attention of two queries over N image tokens, T the top
  p · N of each. Between the layers of a step it says how alike layers are (the paper: low,
  heterogeneity); between the steps of a layer, how fast the layer's choice moves (high for near
  steps, continuity). Two random queries have p.
- Decay: the attention that a text token gets, by its age in text tokens.
- Mass: the shares of attention on the system prefix, the image and the text, by step.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from eval.attention.watch import AnswerAttention
from minivlm.cache.ranking import best_first
from minivlm.errors import UserError

TOKEN_CLASSES = ("system", "vision", "text")


def concordance(attn: Tensor, share: float) -> Tensor:
    """The concordance index [Q, Q] of each two of the queries of attn [Q, N].

    That is the part which the top int(share · N) tokens of both have in common.

    Ties go to the lower index. Raises `UserError` where int(share · N) is 0.
    """
    count = int(share * attn.shape[-1])
    if count < 1:
        raise UserError(f"the top {share:g} of {attn.shape[-1]} vision tokens is not a single one")
    best = best_first(attn.float())[..., :count]
    top = torch.zeros(attn.shape).scatter(-1, best, 1.0)
    return top @ top.mT / count


def answer_statistics(answer: AnswerAttention, shares: Sequence[float], distances: int) -> dict[str, Tensor]:
    """What one answer says, float32; NaN where it is too short.

    layers [P, L, L]: concordance of layers for each of `shares`, mean over steps. steps [P, L, distances]: concordance
    of steps 1 ... distances apart. decay [L, T]: attention by age, 0 the token itself. mass [L, steps, 3] by
    `TOKEN_CLASSES`.
    """
    vision = answer.is_vision.nonzero()[:, 0]
    on_image = torch.stack([attn[:, vision] for attn in answer.attn])  # [steps, L, N]
    by_age, mass = [], []
    for attn in answer.attn:
        is_text = torch.ones(attn.shape[1], dtype=torch.bool)
        is_text[vision] = False
        is_text[: answer.system] = False
        text = attn[:, is_text]
        by_age.append(text.flip(1))
        parts = (attn[:, : answer.system].sum(dim=1), attn[:, vision].sum(dim=1), text.sum(dim=1))
        mass.append(torch.stack(parts, dim=-1))
    return {
        "layers": torch.stack(
            [torch.stack([concordance(step, share) for step in on_image]).mean(dim=0) for share in shares]
        ),
        "steps": torch.stack([_concordance_by_distance(on_image, share, distances) for share in shares]),
        "decay": _stacked(by_age).nanmean(dim=0),
        "mass": torch.stack(mass, dim=1),
    }


def _concordance_by_distance(on_image: Tensor, share: float, distances: int) -> Tensor:
    """Concordance [L, distances] of the steps of on_image [steps, L, N] that are 1 ... distances apart; NaN if none."""
    steps, layers, _ = on_image.shape
    means = torch.full((layers, distances), torch.nan)
    for layer_idx in range(layers):
        index = concordance(on_image[:, layer_idx], share)  # [steps, steps]
        for distance in range(1, min(distances, steps - 1) + 1):
            means[layer_idx, distance - 1] = index.diagonal(distance).mean()
    return means


def mean_statistics(answers: Iterable[AnswerAttention], shares: Sequence[float], distances: int) -> dict[str, Any]:
    """The means over answers, each counting the same, as lists for JSON (None where no answer is long enough).

    Raises `UserError` for shares outside (0, 1], for no answers, and as `concordance`.
    """
    if not all(0 < share <= 1 for share in shares):
        listed = ", ".join(f"{share:g}" for share in shares)
        raise UserError(f"the shares of top tokens are {listed} (expected above 0, up to 1)")
    each, vision_tokens, steps = [], [], []
    for answer in answers:
        each.append(answer_statistics(answer, shares, distances))
        vision_tokens.append(int(answer.is_vision.sum()))
        steps.append(len(answer.attn))
    if not each:
        raise UserError("there are no pages to look at")
    across = torch.stack([one["layers"] for one in each])  # [answers, P, L, L]
    along = torch.stack([one["steps"] for one in each])  # [answers, P, L, distances]
    decay = _stacked([one["decay"] for one in each])  # [answers, L, T]
    mass = _stacked([one["mass"].transpose(1, 2) for one in each])  # [answers, L, 3, steps]
    return {
        "pages": len(each),
        "layers": across.shape[-1],
        "vision_tokens": vision_tokens,
        "steps": steps,
        "concordance": [_mean_concordance(share, across[:, i], along[:, i]) for i, share in enumerate(shares)],
        "text_decay": {"by_layer": _listed(decay.nanmean(dim=0)), "mean": _listed(decay.nanmean(dim=(0, 1)))},
        "mass": {
            name: {
                "by_step": _listed(mass[:, :, i].nanmean(dim=(0, 1))),
                "by_layer": _listed(mass[:, :, i].nanmean(dim=2).mean(dim=0)),
            }
            for i, name in enumerate(TOKEN_CLASSES)
        },
    }


def _mean_concordance(share: float, across: Tensor, along: Tensor) -> dict[str, Any]:
    """The means over answers of across [answers, L, L] and along [answers, L, distances]."""
    others = ~torch.eye(across.shape[-1], dtype=torch.bool)  # a layer agrees with itself
    between_layers = across.mean(dim=0)
    return {
        "share": share,  # also the index of two random queries
        "between_layers": _listed(between_layers),
        "between_layers_mean": _listed(between_layers[others].mean()),
        "between_steps": _listed(along.nanmean(dim=0)),  # [L, distances]
        "between_steps_mean": _listed(along.nanmean(dim=(0, 1))),
    }


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors that differ in their last dimension, filled up with NaN."""
    longest = max(tensor.shape[-1] for tensor in tensors)
    return torch.stack([F.pad(tensor, (0, longest - tensor.shape[-1]), value=torch.nan) for tensor in tensors])


def _listed(values: Tensor) -> Any:
    """Nested lists of rounded numbers, None for NaN."""
    if values.ndim:
        return [_listed(value) for value in values]
    return None if values.isnan() else round(float(values), 6)
