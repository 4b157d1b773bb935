"""The contract of a KV policy: what a policy may decide, and what the cache tells it.

A policy is made of parts. Each part answers a few questions; the cache asks them, stores what follows, and knows
nothing else about the policy. The decoder knows only the cache.

- `VisionSelection`: which image entries a layer keeps after prefill, for all heads alike, and which of them are its
  core. A-VL, random eviction, key norms.
- `TokenBudget`: how many entries each head may hold, and which it evicts, at prefill and at every decode step, of the
  text alone or of everything. H2O, StreamingLLM, SnapKV, PyramidKV.
- `PromptFilter`: which image tokens are computed no further after some layer of the prefill. FastV, PyramidDrop.
- `InputFilter`: which image tokens enter the decoder at all. DivPrune.

Selections and budgets may differ from layer to layer: give a tuple with one part for each layer.

Counts are known before the first layer runs, so that buffers have a fixed size: they may depend on the layer and on
the prompt's numbers, never on what the attention looks like. They are `int()` of Python doubles, relative to the
original prompt, as in the code of A-VL's authors. Scores are float32; the higher stays, ties go to the lower position.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, is_dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from minivlm.errors import UserError

Part = TypeVar("Part")


@dataclass(frozen=True)
class Prompt:
    """The counts of one sequence's prompt; in a later turn, of that turn's new tokens."""

    length: int  # all tokens
    vision: int  # N: image tokens of all its images, newline embeddings included; may be 0


class VisionCounts(NamedTuple):
    """How many of a prompt's image entries a layer keeps, and how many of those are its core."""

    keep: int
    core: int  # the cache takes at most what is kept


class Entries:
    """Some entries of a layer as a policy sees them. Keys and values are copied out only when they are asked for.

    At prefill the leading dimensions are [H_kv, n], n entries of one sequence in the order of the tokens; at a decode
    step they are [B, H_kv, 1], the token of this step.
    """

    def __init__(self, positions: Tensor, keys: Tensor, values: Tensor, index: Tensor | None = None) -> None:
        self.positions = positions  # int32 [..., n]: original positions
        self._keys, self._values, self._index = keys, values, index

    @property
    def keys(self) -> Tensor:
        """[..., n, D], rotated."""
        return self._keys if self._index is None else self._keys[:, self._index]

    @property
    def values(self) -> Tensor:
        """[..., n, D]."""
        return self._values if self._index is None else self._values[:, self._index]


class Candidates(Entries):
    """The image entries of one sequence in one layer among which a selection or a filter chooses, of all its images.

    `attn` float32 [n] is the attention that each gets from the last queries of the prompt, the mean over all query
    heads and over `Policy.window` queries.
    """

    def __init__(
        self,
        positions: Tensor,
        keys: Tensor,
        values: Tensor,
        index: Tensor,
        attn: Tensor,
        kept: int,
        count: int,
        layer_idx: int,
        sample: int,
    ) -> None:
        super().__init__(positions, keys, values, index)
        self.attn = attn
        self.kept = kept  # how many of them, the first ones, stay in any case: those of earlier turns
        self.count = count  # how many of the others will stay
        self.layer_idx = layer_idx
        self.sample = sample  # the sequence's number, for anything that is drawn at random


class VisionSelection(Protocol):
    """Which image entries a layer keeps after prefill, and which of those are its core."""

    @property
    def interval(self) -> int:
        """Decode steps from one choice of the core to the next; at 0 or less, and at 1, the core is never used."""

    def counts(self, prompt: Prompt) -> VisionCounts:
        """How many entries stay, and how many of them are the core. Raises `UserError` if that is infeasible."""

    def scores(self, candidates: Candidates) -> Tensor:
        """Scores [n] by which entries stay."""

    def core_scores(self, candidates: Candidates, scores: Tensor) -> Tensor:
        """Scores [n] by which the first core is chosen, of those that stay by `scores`.

        At a refresh the step's attention chooses.
        """


class TokenBudget(Protocol):
    """Eviction in each head by itself.

    To be subclassed: by default scores start at zero, and attention does not change them.
    """

    over: ClassVar[Literal["text", "all"]]  # the entries it may evict

    def limits(self, before: int, answer: int) -> tuple[int, int]:
        """How many entries may stay, and how many of those are protected for being the most recent.

        `before` counts the tokens before this turn's answer, of those that the budget is over: earlier turns and their
        answers included, evicted ones too; for "text", without the system prefix. `answer` counts the tokens of the
        answer so far. The first number must not fall while `answer` grows. A step evicts at most one entry, so a number
        that rises by two is filled one by one. May raise `UserError`.
        """

    def prompt_queries(self) -> int | Literal["all"]:
        """How many of the last prompt queries `score_prompt` wants; "all": those of every token the budget is over."""
        return 0

    def first_scores(self, entries: Entries) -> Tensor:
        """Scores of entries as they enter: [H_kv, n] at prefill, [B, H_kv, 1] at a step.

        In a later turn it is asked for old entries as well, whose remembered scores then take the place of the answer.
        """
        return torch.zeros(entries.positions.shape, dtype=torch.float32, device=entries.positions.device)

    def score_prompt(self, scores: Tensor, attn: Tensor, own: Tensor) -> Tensor:
        """Scores [H_kv, n] after a block of R prompt queries, from the scores after the block before.

        n are the entries that the budget is over, before this layer evicts any. attn [H_kv, R, n] is the attention that
        they get, summed over the query heads of each group; own [R] is each query's own column.
        """
        return scores

    def score_step(self, scores: Tensor, attn: Tensor, live: Tensor, new: Tensor) -> Tensor:
        """Scores [B, H_kv, T] after a decode step, of the T slots of the tail.

        attn [B, H_kv, T] is the part of the step's attention that falls on them. live [B, 1, T] marks the slots that
        count, new [B, H_kv, T] the token of this step.
        """
        return scores


class PromptFilter(Protocol):
    """Which image tokens of a prompt are still computed after an early layer."""

    @property
    def layer(self) -> int:
        """The first layer that sees only the survivors, 1 ... number of layers."""

    def keep(self, prompt: Prompt) -> int:
        """How many of the prompt's image tokens go on. Raises `UserError` if that is infeasible."""

    def scores(self, candidates: Candidates) -> Tensor:
        """Scores [n] of the image tokens that are still there, from the layer before."""


class InputFilter(Protocol):
    """Which image tokens of a prompt enter the decoder."""

    def keep(self, prompt: Prompt) -> int:
        """How many do. Raises `UserError` if that is infeasible."""

    def scores(self, embeds: Tensor, count: int) -> Tensor:
        """Scores [N] of the image tokens, from the embeddings [N, C] of all images; `count` of them will go on."""


@dataclass(frozen=True)
class Policy:
    """A composition of parts; without any it is the full cache.

    Raises `UserError` where parts exclude each other or do not fit together.
    """

    name: str
    _: KW_ONLY
    vision: VisionSelection | tuple[VisionSelection, ...] | None = None
    budget: TokenBudget | tuple[TokenBudget, ...] | None = None
    filters: tuple[PromptFilter, ...] = ()
    inputs: InputFilter | None = None
    window: int = 1  # last prompt queries whose mean attention scores image entries, at most 128

    def __post_init__(self) -> None:
        who = f"policy {self.name!r}"
        for part in (*_each(self.vision), *_each(self.budget), *self.filters, *_each(self.inputs)):
            if not is_dataclass(part) or type(part).__hash__ is None:
                raise UserError(f"{who}: {type(part).__name__} is no part of a policy (expected a frozen dataclass)")
        if not 1 <= self.window <= 128:
            raise UserError(f"{who}: the window is {self.window} queries (expected 1 to 128)")
        overs = {getattr(part, "over", None) for part in _each(self.budget)}
        if overs - {"text", "all"} or len(overs) > 1:
            raise UserError(
                f"{who}: its budgets are over {_listed(overs)} (expected all over 'text', or all over 'all')"
            )
        intervals = {part.interval for part in _each(self.vision)}
        if len(intervals) > 1:
            raise UserError(
                f"{who}: its selections have intervals {_listed(intervals)} (expected the same in every layer)"
            )
        layers = [part.layer for part in self.filters]
        if min(layers, default=1) < 1 or layers != sorted(set(layers)):
            raise UserError(
                f"{who}: its filters are at layers {layers} (expected 1 or more, each higher than the last)"
            )
        if self.whole_cache and (self.vision is not None or self.filters or self.inputs is not None):
            raise UserError(f"{who}: a budget over all entries excludes parts that choose image entries")

    @property
    def whole_cache(self) -> bool:
        """Whether the token budget is over all entries, image and text alike."""
        return any(part.over == "all" for part in _each(self.budget))

    @property
    def interval(self) -> int:
        """Decode steps from one choice of the core to the next; 0 if nothing has a core."""
        return max((part.interval for part in _each(self.vision)), default=0)

    def vision_at(self, layer_idx: int) -> VisionSelection | None:
        """The selection of a layer."""
        return self.vision[layer_idx] if isinstance(self.vision, tuple) else self.vision

    def budget_at(self, layer_idx: int) -> TokenBudget | None:
        """The token budget of a layer."""
        return self.budget[layer_idx] if isinstance(self.budget, tuple) else self.budget

    def filter_after(self, layer_idx: int) -> PromptFilter | None:
        """The filter that drops tokens once this layer has run."""
        return next((part for part in self.filters if part.layer == layer_idx + 1), None)

    def vision_tokens(self, prompt: Prompt, layer_idx: int) -> int:
        """How many of the prompt's image tokens reach a layer."""
        left = prompt.vision if self.inputs is None else min(self.inputs.keep(prompt), prompt.vision)
        for part in self.filters:
            if part.layer <= layer_idx:
                left = min(part.keep(prompt), left)
        return left

    def check_layers(self, num_layers: int) -> None:
        """Raise `UserError` if parts are missing for a layer, or there are too many."""
        for parts in (self.vision, self.budget):
            if isinstance(parts, tuple) and len(parts) != num_layers:
                raise UserError(f"policy {self.name!r} has parts for {len(parts)} layers, the model has {num_layers}")
        last = max((part.layer for part in self.filters), default=0)
        if last > num_layers:
            raise UserError(f"policy {self.name!r} has a filter at layer {last}, the model has {num_layers} layers")

    def check_prompt(self, prompt: Prompt) -> None:
        """Raise `UserError` if a part cannot do what it is asked with this prompt."""
        for selection in dict.fromkeys(_each(self.vision)):
            _check_counts(selection, "counts", *selection.counts(prompt))
        for prompt_filter in self.filters:
            _check_counts(prompt_filter, "keep", prompt_filter.keep(prompt))
        if self.inputs is not None:
            _check_counts(self.inputs, "keep", self.inputs.keep(prompt))


def _each(parts: Part | tuple[Part, ...] | None) -> tuple[Part, ...]:
    """The parts of a policy of one sort: none, one for all layers, or one for each."""
    if parts is None:
        return ()
    return parts if isinstance(parts, tuple) else (parts,)


def _check_counts(part: object, method: str, *counts: int) -> None:
    if not all(type(count) is int and count >= 0 for count in counts):
        raise UserError(f"{type(part).__name__}.{method} returned {_listed({*counts})} (expected integers from 0 up)")


def _listed(values: set[Any]) -> str:
    return ", ".join(sorted(repr(value) for value in values))


def check_scores(scores: Tensor, shape: tuple[int, ...], part: object, method: str) -> Tensor:
    """The scores that a part's method returned; raises `UserError` unless they are float32 and of this shape."""
    if not isinstance(scores, Tensor) or scores.dtype != torch.float32 or tuple(scores.shape) != shape:
        returned = f"{scores.dtype} {list(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
        name = f"{type(part).__name__}.{method}"
        raise UserError(f"{name} returned {returned} (expected {torch.float32} {list(shape)})")
    return scores


def vision_within(prompt: Prompt, entries: int, kv_budget: float) -> int:
    """How many image entries fit into `entries` beside all the others of the prompt.

    Raises `UserError` if the others alone do not fit.
    """
    others = prompt.length - prompt.vision
    if prompt.vision and entries < others:
        raise UserError(
            f"kv_budget {kv_budget:g} is infeasible: it leaves {max(entries, 0)} entries a layer for a prompt of "
            f"{prompt.length} tokens whose {others} system and text tokens all stay"
        )
    return min(entries - others, prompt.vision) if prompt.vision else 0
