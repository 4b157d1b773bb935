"""How the next token is chosen: greedy, or drawn with a temperature from the likeliest tokens."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real

import torch
from torch import Tensor

from minivlm.errors import UserError

NOT_FINITE = -1  # in the place of a token id
_MOST_TOKENS = 2**31 - 1  # of an answer; no model's context is longer
_COLDEST = torch.finfo(torch.float32).tiny  # a lower temperature would be 0 in float32, and probabilities 0 / 0


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; temperature 0 is greedy, and any integer is a seed.

    Raises `UserError` for values out of range and of other types.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        expect_integer("max_new_tokens", self.max_new_tokens)
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {self.max_new_tokens} (expected at least 1)")
        if self.max_new_tokens > _MOST_TOKENS:
            raise UserError(f"max_new_tokens is too large (expected at most {_MOST_TOKENS})")
        _expect_number("temperature", self.temperature)
        if not 0 <= self.temperature <= sys.float_info.max:
            raise UserError(f"temperature is {self.temperature} (expected 0 or more, and finite)")
        _expect_number("top_p", self.top_p)
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p} (expected a share above 0, up to 1)")
        expect_integer("seed", self.seed)


def expect_integer(name: str, value: object) -> None:
    """Raise `UserError` unless `value` is an integer; True and False are none."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise UserError(f"{name} is {value!r} (expected an integer)")


def _expect_number(name: str, value: object) -> None:
    if not isinstance(value, Real) or isinstance(value, bool):
        raise UserError(f"{name} is {value!r} (expected a number)")


def choose_token(logits: Tensor, sampling: Sampling, generators: Sequence[torch.Generator]) -> Tensor:
    """One token id per row of logits [B, V]; each row draws from its own generator, without waiting for the device.

    It is a valid id even where the logits are not finite: see `checked`.
    """
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.float()
    # The largest becomes 0 before the division, so that no temperature is too small.
    temperature = max(sampling.temperature, _COLDEST)
    probabilities = ((logits - logits.amax(dim=-1, keepdim=True)) / temperature).softmax(dim=-1)
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


def checked(token: Tensor, numbers: Tensor) -> Tensor:
    """The ids [B] for the host: `NOT_FINITE` for rows whose `numbers` [B, n] hold NaN or infinity, else the token.

    The host sees it where it waits for the token anyway. The model is fed the token itself, which is always a valid id.
    """
    least, most = numbers.aminmax(dim=-1)  # both NaN if there is one
    return torch.where((least > -torch.inf) & (most < torch.inf), token, NOT_FINITE)
