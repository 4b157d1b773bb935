"""One row in one layer of a prefill: all its entries before anything is evicted, and the choice of those that stay.

An entry's column is its place in the attention of the row: the old entries come first, then the new ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from minivlm.cache import attention
from minivlm.cache.counts import EntryCounts, TailPlan
from minivlm.cache.policy import Candidates, Entries, PromptFilter, TokenBudget, VisionSelection, check_scores
from minivlm.cache.ranking import LAST, best_first, order_key


class ComputedTokens:
    """The new tokens of one row that are still computed; filters drop image tokens on the way."""

    def __init__(self, index: Tensor, vision: Tensor, text: Tensor) -> None:
        self.index = index  # [S'], their places among the turn's tokens
        self.vision = vision  # which of the S' are image tokens, ascending
        self.text = text  # and which are not

    def __len__(self) -> int:
        return len(self.index)

    def after_dropping_all_but(self, best: Tensor) -> tuple[ComputedTokens, Tensor]:
        """What remains if of the image tokens only `vision[best]` go on, and where it stood among these, [S'']."""
        vision = self.vision[best].sort().values
        left = torch.cat((self.text, vision)).sort().values
        places = torch.searchsorted(left, vision), torch.searchsorted(left, self.text)
        return ComputedTokens(self.index[left], *places), left


class ColumnClasses(NamedTuple):
    """Columns of the entries of each class: old entries first, then new ones. A whole-cache budget has only a tail."""

    vision: Tensor  # [n], ascending
    system: Tensor
    tail: Tensor

    @classmethod
    def of(cls, past: EntryCounts, tokens: ComputedTokens, system: int, whole_cache: bool) -> ColumnClasses:
        """`past` counts the old entries, `system` is how many of the new text tokens are the system prefix."""
        old = past.fixed + past.tail
        columns = torch.arange(old + len(tokens), device=tokens.index.device)
        if whole_cache:
            return cls(columns[:0], columns[:0], columns)
        new = tokens.vision, tokens.text[:system], tokens.text[system:]
        if not old:
            return cls(*new)
        before = columns[:old].split((past.vision, past.system, past.tail))
        return cls(*(torch.cat((those, old + these)) for those, these in zip(before, new, strict=True)))


@dataclass
class Columns:
    """M entries of one row in one layer, and the queries of its new tokens."""

    q: Tensor  # [H, S', D]
    k: Tensor  # [H_kv, M, D]
    v: Tensor  # [H_kv, M, D]
    position: Tensor  # [H_kv, M]
    classes: ColumnClasses
    past: EntryCounts  # the old entries by class, in the order of the layout: vision, system, tail
    past_score: Tensor | None  # [H_kv, past tail], what the token budget remembers
    layer_idx: int
    sample: int

    @property
    def old(self) -> int:
        """How many entries are old, which is also the column of the first new one."""
        return self.past.fixed + self.past.tail

    @property
    def new_vision(self) -> Tensor:
        """Columns [n] of the image entries of this turn."""
        return self.classes.vision[self.past.vision :]

    def entries(self, index: Tensor) -> Entries:
        """The entries in the columns `index` [n], ascending, as a policy sees them."""
        if len(index) == self.k.shape[1]:  # all of them: nothing needs to be copied
            return Entries(self.position, self.k, self.v)
        return Entries(self.position[:, index], self.k, self.v, index)

    def candidates(self, index: Tensor, attn: Tensor, kept: int, count: int) -> Candidates:
        """The image entries in the columns `index` [n] as a policy sees them, with the attention attn [M] of all.

        The first `kept` of them stay in any case, and `count` of the others.
        """
        position = self.position[:, index]
        return Candidates(position, self.k, self.v, index, attn[index], kept, count, self.layer_idx, self.sample)

    def mean_attention(self, window: int) -> Tensor:
        """Attention [M] of the last `window` queries, averaged over them and over all query heads."""
        n, visible = self.q.shape[1], None
        if window > 1:
            visible = torch.arange(self.old + n - window, self.old + n, device=self.q.device) + 1
        weights = attention.weights(self.q[:, n - window :], self.k, visible)  # [H_kv, window, M]
        return weights.sum(dim=0).mean(dim=0) / len(self.q)


def filter_scores(prompt_filter: PromptFilter, columns: Columns, attn: Tensor | None, count: int) -> Tensor:
    """Scores [n] of the image tokens that are still computed, of which `count` will go on."""
    index = columns.new_vision
    if attn is None or not len(index):
        return torch.zeros(0, device=columns.k.device)
    scores = prompt_filter.scores(columns.candidates(index, attn, 0, min(count, len(index))))
    return check_scores(scores, (len(index),), prompt_filter, "scores")


def choose_vision(
    selection: VisionSelection, columns: Columns, attn: Tensor, counts: EntryCounts
) -> tuple[Tensor, Tensor]:
    """Columns [n] of the image entries that stay, ascending, and which of them are the core, bool [n].

    Old entries stay in any case; `counts` says how many there will be.
    """
    index, past = columns.classes.vision, columns.past.vision
    count = counts.vision - past
    candidates = columns.candidates(index, attn, past, count)
    scores = check_scores(selection.scores(candidates), (len(index),), selection, "scores")
    kept = past + best_first(scores[past:])[:count].sort().values
    if past:
        kept = torch.cat((torch.arange(past, device=kept.device), kept))
    core_scores = check_scores(selection.core_scores(candidates, scores), (len(index),), selection, "core_scores")
    core = torch.zeros_like(kept, dtype=torch.bool)
    core.index_fill_(0, best_first(core_scores[kept])[: counts.core], True)
    return index[kept], core


def choose_tail(budget: TokenBudget, columns: Columns, plan: TailPlan) -> tuple[Tensor | None, Tensor]:
    """The tail's columns that stay in each head, [H_kv, n], or None if all do; and their scores."""
    tail = columns.classes.tail
    score = _tail_scores(budget, columns, tail)
    if plan.lengths[0] == len(tail):
        return None, score
    position = columns.position[:, tail]
    key = torch.where(position < plan.recent_from, order_key(score, position), LAST)
    keep = key.argsort(dim=1, descending=True)[:, : plan.lengths[0]].sort(dim=1).values  # [H_kv, n]
    return tail[keep], score.gather(1, keep)


def _tail_scores(budget: TokenBudget, columns: Columns, tail: Tensor) -> Tensor:
    """Scores [H_kv, n] of the tail's columns [n]: old ones remembered, then the new queries block by block."""
    known = columns.past.tail
    shape = (len(columns.k), len(tail))
    score = budget.first_scores(columns.entries(tail))
    check_scores(score, shape, budget, "first_scores")
    if columns.past_score is not None:
        score = torch.cat((columns.past_score, score[:, known:]), dim=1)
    wanted = budget.prompt_queries()
    queries = tail[known:] - columns.old  # those of the tail's own new tokens
    own = torch.arange(known, len(tail), device=tail.device)
    if wanted != "all":
        skipped = max(len(queries) - wanted, 0)
        queries, own = queries[skipped:], own[skipped:]
    rows = attention.query_block(tail.device)
    for first in range(0, len(queries), rows):
        block = slice(first, first + rows)
        visible = columns.old + queries[block] + 1
        weights = attention.weights(columns.q[:, queries[block]], columns.k, visible)
        if len(tail) < weights.shape[2]:  # else it is all columns, and nothing needs to be copied
            weights = weights[:, :, tail]
        score = budget.score_prompt(score, weights, own[block])
        check_scores(score, shape, budget, "score_prompt")
    return score
