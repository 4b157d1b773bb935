"""What a KV policy is: up to three small parts, and nothing else.

A policy decides, the cache stores, the decoder knows only the cache.  All counts are `int()` of Python doubles of
counts of the original prompt, as the paper's code computes them; all scores are float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from minivlm.errors import UserError


@dataclass(frozen=True)
class Prompt:
    """The counts of one sequence's prompt (in a later turn: of the turn's new tokens)."""

    length: int  # all tokens
    vision: int  # N: image tokens, newline embeddings included


class VisionSelection(Protocol):
    """Which vision entries a layer keeps after prefill, and which of those are its core."""

    interval: int  # decode steps from one re-selection of the core to the next; <= 0: the core is never used

    def keep(self, prompt: Prompt) -> int:
        """How many of the prompt's vision entries stay in each layer."""

    def core(self, prompt: Prompt) -> int:
        """How many of them take part in a step between two refreshes (the cache takes at most what is kept)."""

    def scores(self, attention: Tensor, layer: int, sample: int) -> Tensor:
        """Score [n] of n vision entries, from the attention [n] they get, averaged over query heads and scored rows."""


class TokenBudget(Protocol):
    """Per-head eviction, at most one entry a decode step."""

    over: Literal["text", "all"]  # the entries it may evict
    prompt_rows: Literal["over", "last", "none"]  # the prompt's queries that score: those of `over`, the last, none

    def limits(self, seen: int) -> tuple[int, int]:
        """(entries that may stay, how many of them are the most recent and protected) once `seen` have been seen."""

    def start(self, positions: Tensor) -> Tensor:
        """First scores of entries at original positions [H_kv, n] -> float32 [H_kv, n]."""

    def score_rows(self, scores: Tensor, rows: Tensor, own: Tensor) -> Tensor:
        """Scores [H_kv, n] after a block of prompt queries.

        rows [H_kv, R, n] is their attention, summed over each group's query heads, columns in the order of the
        tokens; own [R] is each query's own column.
        """

    def score_step(self, scores: Tensor, row: Tensor, live: Tensor, new: Tensor) -> Tensor:
        """Scores [B, H_kv, slots] after a decode step with attention `row` [B, H_kv, slots].

        live [B, 1, slots] marks the entries in question; new [B, H_kv, slots] this step's token, whose slot still
        holds the score of what was there before.
        """


class PromptFilter(Protocol):
    """Which vision tokens of a prompt are still computed behind an early layer, chosen by attention."""

    layer: int  # the first layer that sees only the survivors, 1 ... number of layers

    def keep(self, prompt: Prompt) -> int:
        """How many of the prompt's vision tokens go on."""


@dataclass(frozen=True)
class Policy:
    """A composition of parts; without any, the full cache."""

    name: str
    vision: VisionSelection | None = None
    budget: TokenBudget | None = None
    filter: PromptFilter | None = None
    window: int = 1  # last prompt rows whose mean attention scores vision at prefill


def vision_within(prompt: Prompt, entries: int, kv_budget: float) -> int:
    """How many vision entries fit into `entries` beside all the others of the prompt.

    Raises `UserError` where already the others do not fit.
    """
    others = prompt.length - prompt.vision
    if prompt.vision and entries < others:
        raise UserError(
            f"kv_budget {kv_budget:g} is infeasible: it leaves {max(entries, 0)} entries a layer for a prompt of "
            f"{prompt.length} tokens whose {others} system and text tokens all stay"
        )
    return min(entries - others, prompt.vision) if prompt.vision else 0
