"""How the next token is chosen: greedy, or drawn with a temperature from the likeliest tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minivlm.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; temperature 0 is greedy. Raises `UserError` for values out of range."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {self.max_new_tokens} (expected at least 1)")
        if not self.temperature >= 0:
            raise UserError(f"temperature is {self.temperature} (expected 0 or more)")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p} (expected a share above 0, up to 1)")


def choose_token(logits: Tensor, sampling: Sampling, generators: Sequence[torch.Generator]) -> Tensor:
    """One token id per row of logits [B, V]; each row draws from its own generator, without waiting for the device."""
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.float()
    # The largest becomes 0 before the division, so that no temperature is too small.
    probabilities = ((logits - logits.amax(dim=-1, keepdim=True)) / sampling.temperature).softmax(dim=-1)
    if sampling.top_p < 1:
        ordered, index = probabilities.sort(dim=-1, descending=True)
        ordered[ordered.cumsum(dim=-1) - ordered >= sampling.top_p] = 0  # the token that crosses top_p stays
        probabilities = torch.zeros_like(probabilities).scatter(-1, index, ordered)
    # argmax(p / e) with e exponentially distributed draws from p.
    noise = torch.stack(
        [
            torch.empty_like(row).exponential_(generator=generator)
            for row, generator in zip(probabilities, generators, strict=True)
        ]
    )
    return (probabilities / noise).argmax(dim=-1)
