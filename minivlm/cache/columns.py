"""One row in one layer of a prefill: all its entries before anything is evicted, and the choice of those that stay.

An entry's column is its place in the attention of the row: the old entries come first, then the new ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from minivlm.cache import attention
from minivlm.cache.counts import EntryCounts, TailPlan
from minivlm.cache.policy import Candidates, Entries, PromptFilter, TokenBudget, VisionSelection, check_scores
from minivlm.cache.ranking import LAST, best_first, order_key


class ComputedTokens:
    """The new tokens of one row that are still computed; filters drop image tokens on the way."""

    def __init__(self, index: Tensor, is_vision: Tensor) -> None:
        self.index = index  # [S'], their places among the turn's tokens
        self.vision = is_vision.nonzero()[:, 0]  # which of the S' are image tokens
        self.text = (~is_vision).nonzero()[:, 0]  # and which are not

    def __len__(self) -> int:
        return len(self.index)

    def after_dropping_all_but(self, best: Tensor) -> tuple[ComputedTokens, Tensor]:
        """What remains if of the image tokens only `vision[best]` go on, and where it stood among these, [S'']."""
        left = torch.cat((self.text, self.vision[best])).sort().values
        return ComputedTokens(self.index[left], torch.isin(left, self.vision[best])), left


@dataclass
class Columns:
    """M entries of one row in one layer, and the queries of its new tokens."""

    q: Tensor  # [H, S', D]
    k: Tensor  # [H_kv, M, D]
    v: Tensor  # [H_kv, M, D]
    position: Tensor  # [H_kv, M]
    past: EntryCounts  # the old entries by class, in the order of the layout: vision, system, tail
    past_score: Tensor | None  # [H_kv, past tail], what the token budget remembers
    tokens: ComputedTokens
    layer_idx: int
    sample: int

    @property
    def old(self) -> int:
        """How many entries are old, which is also the column of the first new one."""
        return self.past.fixed + self.past.tail

    @property
    def num_vision(self) -> int:
        """How many of the entries are image entries."""
        return self.past.vision + len(self.tokens.vision)

    @property
    def vision(self) -> Tensor:
        """Columns [n] of the image entries, ascending."""
        return torch.cat((torch.arange(self.past.vision, device=self.k.device), self.old + self.tokens.vision))

    def system(self, new: int) -> Tensor:
        """Columns of the system entries, old ones and the first `new` of the new text."""
        old = torch.arange(self.past.vision, self.past.fixed, device=self.k.device)
        return torch.cat((old, self.old + self.tokens.text[:new]))

    def tail(self, new_system: int) -> Tensor:
        """Columns of the tail's entries, old ones and the new text after the system prefix."""
        old = torch.arange(self.past.fixed, self.old, device=self.k.device)
        return torch.cat((old, self.old + self.tokens.text[new_system:]))

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
        n = self.q.shape[1]
        visible = torch.arange(self.old + n - window, self.old + n, device=self.q.device) + 1
        weights = attention.weights(self.q[:, n - window :], self.k, visible)  # [H_kv, window, M]
        return weights.sum(dim=0).mean(dim=0) / len(self.q)


def filter_scores(prompt_filter: PromptFilter, columns: Columns, attn: Tensor | None, count: int) -> Tensor:
    """Scores [n] of the image tokens that are still computed, of which `count` will go on."""
    if attn is None or not len(columns.tokens.vision):
        return torch.zeros(0, device=columns.k.device)
    index, count = columns.old + columns.tokens.vision, min(count, len(columns.tokens.vision))
    scores = prompt_filter.scores(columns.candidates(index, attn, 0, count))
    return check_scores(scores, (len(columns.tokens.vision),), prompt_filter, "scores")


def choose_vision(
    selection: VisionSelection | None, columns: Columns, attn: Tensor | None, counts: EntryCounts
) -> tuple[Tensor, Tensor]:
    """Columns [n] of the image entries that stay, ascending, and which of them are the core, bool [n].

    Old entries stay in any case; `counts` says how many there will be.
    """
    index, past = columns.vision, columns.past.vision
    if attn is None or selection is None:
        return index, torch.ones_like(index, dtype=torch.bool)
    count = counts.vision - past
    candidates = columns.candidates(index, attn, past, count)
    position = columns.position[0, index]
    scores = check_scores(selection.scores(candidates), (len(index),), selection, "scores")
    best = past + best_first(scores[past:], position[past:])[:count]
    kept = torch.cat((torch.arange(past, device=best.device), best.sort().values))
    core_scores = check_scores(selection.core_scores(candidates, scores), (len(index),), selection, "core_scores")
    core_first = best_first(core_scores[kept], position[kept])
    core = torch.zeros_like(kept, dtype=torch.bool).index_fill_(0, core_first[: counts.core], True)
    return index[kept], core


def choose_tail(
    budget: TokenBudget | None, columns: Columns, tail: Tensor, plan: TailPlan
) -> tuple[Tensor, Tensor | None]:
    """Of the tail's columns [n], those that stay in each head, [H_kv, n'], and their scores."""
    if budget is None:
        return tail.expand(len(columns.k), -1), None
    score = _tail_scores(budget, columns, tail)
    if plan.lengths[0] == len(tail):
        return tail.expand(len(columns.k), -1), score
    position = columns.position[:, tail]
    key = torch.where(position < plan.recent_from, order_key(score, position), LAST)
    keep = key.argsort(dim=1, descending=True)[:, : plan.lengths[0]].sort(dim=1).values  # [H_kv, n']
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
    for first in range(0, len(queries), attention.QUERY_BLOCK):
        block = slice(first, first + attention.QUERY_BLOCK)
        visible = columns.old + queries[block] + 1
        weights = attention.weights(columns.q[:, queries[block]], columns.k, visible)[:, :, tail]
        score = budget.score_prompt(score, weights, own[block])
        check_scores(score, shape, budget, "score_prompt")
    return score
