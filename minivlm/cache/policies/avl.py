"""A-VL: adaptive attention for large vision-language models (AAAI 2025, arXiv 2409.14846).

Attention to an image stays, from few and slowly drifting places: each layer keeps its best image entries, and lets only
a core of them take part between refreshes. Attention to text fades: text entries are evicted in each head. And the
least attended image tokens are computed no further after an early layer of the prefill.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from minivlm.cache.policies.h2o import HeavyHitters, WholeCacheH2O
from minivlm.cache.policy import Candidates, Policy, Prompt, TokenBudget, VisionCounts, vision_within
from minivlm.cache.ranking import masked_quantile
from minivlm.cache.settings import CacheSettings, flag_names, setting
from minivlm.errors import UserError


@dataclass(frozen=True)
class AdaptiveVision:
    """Eviction of image entries, with a core; rates are shares removed.

    With `kv_budget` the rate follows from the share of the prompt's KV bytes that may stay.
    """

    rate: float
    compute_rate: float
    interval: int
    kv_budget: float | None = None

    def counts(self, prompt: Prompt) -> VisionCounts:
        if self.kv_budget is None:
            keep = int((1 - self.rate) * prompt.vision)
        else:
            keep = vision_within(prompt, int(self.kv_budget * prompt.length), self.kv_budget)
        return VisionCounts(keep, core=int((1 - self.compute_rate) * prompt.vision))

    def scores(self, candidates: Candidates) -> Tensor:
        return candidates.attn

    def core_scores(self, candidates: Candidates, scores: Tensor) -> Tensor:
        return candidates.attn


@dataclass(frozen=True)
class AdaptiveFilter:
    """The prefill filter: from `layer` on, only a share of the image tokens is computed."""

    layer: int
    rate: float
    num_layers: int
    kv_budget: float | None = None

    def keep(self, prompt: Prompt) -> int:
        if self.kv_budget is None:
            return int((1 - self.rate) * prompt.vision)
        # The first layers hold everything, so the later ones have to make up for them.
        entries = int(self.kv_budget * prompt.length * self.num_layers) - self.layer * prompt.length
        return vision_within(prompt, entries // max(self.num_layers - self.layer, 1), self.kv_budget)

    def scores(self, candidates: Candidates) -> Tensor:
        return candidates.attn


@dataclass(frozen=True)
class TextBudget(TokenBudget):
    """How much text stays in each head: a share of all text so far, but never fewer than `init_cache` entries."""

    rate: float
    init_cache: int
    over: ClassVar = "text"

    def budget(self, seen: int) -> int:
        return max(round((1 - self.rate) * seen), self.init_cache)  # Python rounds half to even, as the paper's code


@dataclass(frozen=True)
class TextH2O(HeavyHitters, TextBudget):
    """Heavy hitters by accumulated attention, and the most recent."""

    hh_rate: float

    def limits(self, before: int, answer: int) -> tuple[int, int]:
        budget = self.budget(before + answer)
        return budget, budget - int(budget * self.hh_rate)


@dataclass(frozen=True)
class TextDirect(TextBudget):
    """The best of the last query alone: no memory, nothing protected, not even the current token."""

    def limits(self, before: int, answer: int) -> tuple[int, int]:
        return self.budget(before + answer), 0

    def prompt_queries(self) -> int:
        return 1

    def score_prompt(self, scores: Tensor, attn: Tensor, own: Tensor) -> Tensor:
        return attn[:, -1]

    def score_step(self, scores: Tensor, attn: Tensor, live: Tensor, new: Tensor) -> Tensor:
        return attn


@dataclass(frozen=True)
class TextHistory(TextBudget):
    """Attention above a quantile of its query's weights, accumulated; half of the budget is for the most recent."""

    def limits(self, before: int, answer: int) -> tuple[int, int]:
        budget = self.budget(before + answer)
        return budget, budget // 2

    def prompt_queries(self) -> Literal["all"]:
        return "all"

    def score_prompt(self, scores: Tensor, attn: Tensor, own: Tensor) -> Tensor:
        columns = torch.arange(attn.shape[-1], device=attn.device)
        earlier = columns < own[:, None]  # [R, n]
        gain = torch.where(earlier, attn - masked_quantile(attn, earlier.expand_as(attn), self.rate), 0)
        gain = torch.where(columns == own[:, None], attn, gain)  # a token enters with its own weight
        return scores + gain.sum(dim=1)

    def score_step(self, scores: Tensor, attn: Tensor, live: Tensor, new: Tensor) -> Tensor:
        gain = attn - masked_quantile(attn, live.expand_as(attn), self.rate)
        return torch.where(new, attn, scores + gain)


@dataclass(frozen=True, kw_only=True)
class AVLSettings(CacheSettings):
    """The numbers of A-VL and its parts' switches, with the flags and defaults of the authors' code.

    Rates are shares removed, in [0, 1]. Without any part this is the full cache.
    """

    policy: str = "full"
    vision: bool = setting(False, "evict image entries after prefill", flag="vision_adaptive_attention")
    vision_rate: float = setting(0.5, "share of the image entries evicted", flag="vision_adaptive_attention_rate")
    vision_compute_rate: float = setting(
        0.6, "share of the image entries left out of a core step", flag="vision_adaptive_attention_compute_rate"
    )
    vision_interval: int = setting(
        -1,
        "decode steps from one choice of the core to the next; 0 or less: no core",
        flag="vision_adaptive_attention_update_interval",
    )
    filter: bool = setting(
        False, "stop computing the least attended image tokens in prefill", flag="prefill_filter_flag"
    )
    filter_layer: int = setting(3, "the first layer that sees only the survivors", flag="prefill_filter_layer")
    filter_rate: float = setting(0.5, "share of the image tokens that are dropped there", flag="prefill_filter_rate")
    text: bool = setting(False, "evict text entries in each head", flag="text_pruning_flag")
    text_rate: float = setting(0.5, "share of the text entries evicted", flag="text_pruning_rate")
    text_init_cache: int = setting(20, "text entries that may always stay")
    text_h2o: bool = setting(True, "evict text by accumulated attention", flag="text_use_h2o")
    text_hh_rate: float = setting(0.7, "share of the text budget for heavy hitters", flag="text_h20_hh_rate_in_cache")
    text_direct: bool = setting(
        False, "evict text by the last query alone (without text_use_h2o)", flag="compare_text_direct_pruning"
    )
    all_h2o: bool = setting(False, "H2O over the whole cache, text and image alike", flag="all_use_h2o")
    text_pruning_interval: int | None = setting(
        None, "accepted, without effect: the text budget is applied at every step", value_type=int
    )
    score_window: int = setting(
        1, "last prompt queries whose mean attention scores image entries", flag="vision_score_window"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        flags = flag_names(type(self))
        for name in ("vision_rate", "vision_compute_rate", "filter_rate", "text_rate", "text_hh_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"--{flags[name]} is {getattr(self, name):g} (expected a share from 0 to 1)")
        for name, least in (("filter_layer", 1), ("text_init_cache", 0), ("score_window", 1)):
            if getattr(self, name) < least:
                raise UserError(f"--{flags[name]} is {getattr(self, name)} (expected at least {least})")
        if self.score_window > 128:
            raise UserError(f"--vision_score_window is {self.score_window} (expected at most 128 queries)")
        if self.text_direct and self.text_h2o and self.text:
            raise UserError("--compare_text_direct_pruning needs --text_use_h2o false: one rule evicts text, not two")
        parts = [f"--{flags[name]}" for name in ("vision", "filter", "text") if getattr(self, name)]
        if self.all_h2o and parts:
            raise UserError(f"--{flags['all_h2o']} decides over text and image alike and excludes {parts[0]}")
        if self.kv_budget not in (None, 1) and not (self.all_h2o or self.vision or self.filter):
            raise UserError(
                f"--kv_budget {self.kv_budget:g}: the full cache holds everything "
                "(expected a policy that evicts image entries, or any entries)"
            )

    def build(self, num_layers: int) -> Policy:
        if self.filter and self.filter_layer > num_layers:
            raise UserError(f"--prefill_filter_layer is {self.filter_layer}, the model has {num_layers} layers")
        filters: tuple[AdaptiveFilter, ...] = ()
        if self.filter:
            # If image entries are evicted anyway, the budget is kept there and the filter keeps its rate.
            kv_budget = None if self.vision else self.kv_budget
            filters = (AdaptiveFilter(self.filter_layer, self.filter_rate, num_layers, kv_budget),)
        return Policy(
            name=self.policy,
            vision=self.vision_selection() if self.vision else None,
            budget=self._token_budget(),
            filters=filters,
            window=self.score_window,
        )

    def vision_selection(self) -> AdaptiveVision:
        """The part that evicts image entries."""
        return AdaptiveVision(self.vision_rate, self.vision_compute_rate, self.vision_interval, self.kv_budget)

    def _token_budget(self) -> TokenBudget | None:
        if self.all_h2o:
            return WholeCacheH2O(0.5 if self.kv_budget is None else self.kv_budget)
        if not self.text:
            return None
        if self.text_h2o:
            return TextH2O(self.text_rate, self.text_init_cache, self.text_hh_rate)
        if self.text_direct:
            return TextDirect(self.text_rate, self.text_init_cache)
        return TextHistory(self.text_rate, self.text_init_cache)

    def notes(self, images: bool = True) -> list[str]:
        notes = []
        if self.text_pruning_interval is not None:
            notes.append("--text_pruning_interval has no effect: the text budget is applied at every step")
        core_is_all = self.vision_compute_rate <= self.vision_rate and self.kv_budget is None
        if self.vision and self.vision_interval > 0 and core_is_all:
            rates = f"compute rate {self.vision_compute_rate:g} <= rate {self.vision_rate:g}"
            notes.append(f"{rates}: the core is everything kept")
        if not (self.vision or self.filter or self.text or self.all_h2o):
            notes.append(f"policy {self.policy!r} saves no bytes")
        if self.kv_budget is not None and not images and (self.vision or self.filter):
            notes.append("--kv_budget has no effect on a prompt without images: it is kept by evicting image entries")
        return notes
