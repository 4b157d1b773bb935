"""The prefill pass: attend, score, choose, compact, one layer at a time.

Each layer's entries are chosen and moved into that layer's buffers before the next layer runs. So at its peak prefill
holds the compact cache and the keys and values of one layer, never the full cache. Later turns of a conversation come
through here as well: their queries see everything that was kept and themselves causally, and only new image tokens are
up for choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from minivlm.cache import attention
from minivlm.cache.buffers import LayerBuffers
from minivlm.cache.counts import EntryCounts, TailPlan, TurnPlan, plan_entries
from minivlm.cache.policy import Candidates, Entries, TokenBudget
from minivlm.cache.ranking import LAST, best_first, order_key
from minivlm.cache.state import CacheState


class ActiveTokens:
    """The new tokens of one sequence that are still computed; a filter drops image tokens on the way."""

    def __init__(self, index: Tensor, is_vision: Tensor) -> None:
        self.index = index  # [S'], their places among the turn's tokens
        self.vision = is_vision.nonzero()[:, 0]  # which of the S' are image tokens
        self.text = (~is_vision).nonzero()[:, 0]  # and which are not

    def __len__(self) -> int:
        return len(self.index)

    def after_dropping_all_but(self, best: Tensor) -> tuple[ActiveTokens, Tensor]:
        """What remains of these tokens if of the image tokens only `vision[best]` go on, and where it stood, [S'']."""
        left = torch.cat((self.text, self.vision[best])).sort().values
        return ActiveTokens(self.index[left], torch.isin(left, self.vision[best])), left


@dataclass
class Columns:
    """All entries of one sequence in one layer before anything is evicted: M of them, old ones first."""

    k: Tensor  # [H_kv, M, D]
    v: Tensor  # [H_kv, M, D]
    position: Tensor  # [H_kv, M]
    past: EntryCounts  # the old ones by class, in the order of the layout: vision, system, tail
    past_score: Tensor | None  # [H_kv, past tail], what the token budget remembers

    @property
    def old(self) -> int:
        """How many entries are old."""
        return self.past.fixed + self.past.tail

    def entries(self, index: Tensor) -> Entries:
        """The entries in some columns [n], as a policy sees them."""
        return Entries(self.position[:, index], self.k, self.v, index)

    def candidates(self, index: Tensor, attn: Tensor, count: int, layer_idx: int, sample: int) -> Candidates:
        """The same of image entries, with the attention attn [M] that all columns get."""
        return Candidates(self.position[:, index], self.k, self.v, index, attn[index], count, layer_idx, sample)


class PrefillPass:
    """One turn's pass for some rows of the batch; the decoder takes it as its cache.

    A large batch is prefilled in several passes, one after the other, into the same buffers.
    """

    def __init__(self, state: CacheState, turns: Sequence[TurnPlan], rows: range, later: bool) -> None:
        self.state, self.policy, self.layers = state, state.policy, state.layers
        self.later = later  # whether there are entries from earlier turns
        self.all_turns = turns
        self.rows = rows  # of the batch
        self.turns = [turns[row] for row in rows]
        device = state.device
        self.tokens = [
            ActiveTokens(torch.arange(len(turn.is_vision), device=device), turn.is_vision.to(device))
            for turn in self.turns
        ]
        self.computed: list[list[Tensor]] = []  # per layer and row: which of the turn's tokens it computed, [S']
        self._filter_scores: list[Tensor] = []

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row that are still computed; after the last layer, the last of them yields the logits."""
        return [len(tokens) for tokens in self.tokens]

    # --- what the model asks -----------------------------------------------------------------------------------------

    def enter(self, embeds: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings [B, S, C] of the rows' new tokens -> those that enter the decoder and their positions [B, S']."""
        inputs = self.policy.inputs
        if inputs is not None:
            left = []
            for i, turn in enumerate(self.turns):
                tokens, count = self.tokens[i], inputs.keep(turn.prompt)
                scores = inputs.scores(embeds[i, tokens.vision], count) if len(tokens.vision) else embeds[i, :0, 0]
                self.tokens[i], index = tokens.after_dropping_all_but(best_first(scores.float(), tokens.vision)[:count])
                left.append(index)
            index = pad_sequence(left, batch_first=True)
            embeds = embeds.gather(1, index[..., None].expand(-1, -1, embeds.shape[-1]))
        positions = [turn.start + tokens.index for turn, tokens in zip(self.turns, self.tokens, strict=True)]
        padded = pad_sequence(positions, batch_first=True)
        return embeds[:, : padded.shape[1]], padded

    def attend(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend to q [B, H, S, D], k and v [B, H_kv, S, D] of the turn's tokens -> [B, H, S, D]; store what stays."""
        self.computed.append([tokens.index for tokens in self.tokens])
        columns = [self._columns(layer_idx, i, k[i, :, :n], v[i, :, :n]) for i, n in enumerate(self.lengths)]
        if self.later:
            out = torch.zeros_like(q)
            for i, (old_and_new, n) in enumerate(zip(columns, self.lengths, strict=True)):
                out[i, :, :n] = attention.prefill_after(q[i : i + 1, :, :n], old_and_new.k[None], old_and_new.v[None])[
                    0
                ]
        else:
            out = attention.prefill(q, k, v)
        counts = [self._plan(layer_idx, row) for row in range(len(self.all_turns))]
        buffers = self._allocate(layer_idx, counts, k)
        self._filter_scores = []
        for i, n in enumerate(self.lengths):
            self._store(buffers, layer_idx, i, columns[i], q[i, :, :n])
        buffers.list_core()
        return out

    def survivors(self, layer_idx: int) -> Tensor | None:
        """The tokens [B, S'] that go on after this layer, right-padded with the first one; None if all do."""
        prompt_filter = self.policy.filter_after(layer_idx)
        if prompt_filter is None or layer_idx == self.state.config.num_hidden_layers - 1:
            return None
        left = []
        for i, (tokens, turn) in enumerate(zip(self.tokens, self.turns, strict=True)):
            best = best_first(self._filter_scores[i], tokens.vision)[: prompt_filter.keep(turn.prompt)]
            self.tokens[i], index = tokens.after_dropping_all_but(best)
            left.append(index)
        return pad_sequence(left, batch_first=True)

    # --- one layer ---------------------------------------------------------------------------------------------------

    def _columns(self, layer_idx: int, i: int, k: Tensor, v: Tensor) -> Columns:
        """The old entries of one row and its new ones, k and v [H_kv, S', D]."""
        position = (self.turns[i].start + self.tokens[i].index).int().expand(len(k), -1)
        if not self.later:
            return Columns(k, v, position, EntryCounts(), None)
        buffers, row, tail = self.layers[layer_idx], self.rows[i], self._tail_plan(layer_idx, i).past
        counts = buffers.counts[row]
        slots = buffers.layout.live(counts, tail, buffers.write_slot[row])  # [H_kv, n]
        head = torch.arange(len(k), device=k.device)[:, None]
        score = None
        if buffers.score is not None:
            score = buffers.score[row][head, slots[:, counts.fixed :] - buffers.layout.tail_start]
        return Columns(
            k=torch.cat((buffers.k[row][head, slots], k), dim=1),
            v=torch.cat((buffers.v[row][head, slots], v), dim=1),
            position=torch.cat((buffers.position[row][head, slots], position), dim=1),
            past=EntryCounts(counts.vision, counts.core, counts.system, tail),
            past_score=score,
        )

    def _tail_plan(self, layer_idx: int, i: int) -> TailPlan:
        return self.turns[i].tails[self.state.budget_group[layer_idx]]

    def _plan(self, layer_idx: int, row: int) -> EntryCounts:
        """What a row of the batch will hold in a layer: counts alone, so it is known before any pass has run."""
        past = self.layers[layer_idx].counts[row] if self.later else EntryCounts()
        return plan_entries(self.policy, layer_idx, self.state.budget_group[layer_idx], self.all_turns[row], past)

    def _allocate(self, layer_idx: int, counts: Sequence[EntryCounts], like: Tensor) -> LayerBuffers:
        """The layer's buffers, the old ones if they fit."""
        scored = self.policy.budget is not None
        if layer_idx < len(self.layers):
            if self.layers[layer_idx].fits(counts, scored):
                self.layers[layer_idx].arrange(counts)
                return self.layers[layer_idx]
            del self.layers[layer_idx]  # before the new ones are made: never hold both
        buffers = LayerBuffers(
            counts,
            kv_heads=like.shape[1],
            head_dim=like.shape[3],
            scored=scored,
            indexed=self.state.indexed,
            dtype=like.dtype,
            device=like.device,
        )
        self.layers.insert(layer_idx, buffers)
        return buffers

    def _store(self, buffers: LayerBuffers, layer_idx: int, i: int, columns: Columns, q: Tensor) -> None:
        """Choose one row's entries in one layer and write them where the layout wants them; q [H, S', D]."""
        row = self.rows[i]
        counts, tokens, turn, past = buffers.counts[row], self.tokens[i], self.turns[i], columns.past
        new = columns.old  # the column of the first new token

        # 1. The attention that scores image entries, if anything is scored by it; and the scores of a filter.
        attn = None
        prompt_filter = self.policy.filter_after(layer_idx)
        if (self.policy.vision is not None or prompt_filter is not None) and past.vision + len(tokens.vision):
            attn = self._mean_attention(columns, q, len(tokens.text) - turn.system)  # [M]
        if prompt_filter is not None:
            scores = q.new_zeros(0, dtype=torch.float32)
            if attn is not None and len(tokens.vision):
                index = new + tokens.vision
                count = prompt_filter.keep(turn.prompt)
                scores = prompt_filter.scores(columns.candidates(index, attn, count, layer_idx, turn.sample))
            self._filter_scores.append(scores)

        # 2. The entries that no step evicts, and which of them are the core.
        if self.policy.whole_cache:
            fixed = tokens.index[:0]
            core = torch.zeros(0, dtype=torch.bool, device=q.device)
            tail = torch.arange(new + len(tokens), device=q.device)
        else:
            vision, core = self._choose_vision(columns, attn, counts, layer_idx, i)
            old_system = torch.arange(past.vision, past.fixed, device=q.device)
            fixed = torch.cat((vision, old_system, new + tokens.text[: turn.system]))
            old_tail = torch.arange(past.fixed, new, device=q.device)
            tail = torch.cat((old_tail, new + tokens.text[turn.system :]))

        # 3. The entries of the tail that stay in each head.
        tail_by_head, score = self._choose_tail(columns, q, tail, layer_idx, i)

        # 4. All of them into place. `gather` writes there directly: no second copy of what stays.
        index = torch.cat((fixed.expand(len(columns.k), -1), tail_by_head), dim=1)  # [H_kv, n]
        window = buffers.layout.prefilled(counts)
        by_channel = index[..., None].expand(-1, -1, columns.k.shape[2])  # [H_kv, n, D]
        torch.gather(columns.k, 1, by_channel, out=buffers.k[row, :, window])
        torch.gather(columns.v, 1, by_channel, out=buffers.v[row, :, window])
        buffers.position[row, :, window] = columns.position.gather(1, index)
        buffers.mark_core(row, core)
        if attn is not None:
            buffers.vision_attn[row, window.start :] = attn[fixed]
        if score is not None and buffers.score is not None:
            buffers.score[row, :, : counts.tail] = score

    def _mean_attention(self, columns: Columns, q: Tensor, text: int) -> Tensor:
        """Attention [M] of the last queries, averaged over all query heads and over the queries of the window."""
        n = q.shape[1]
        window = max(min(self.policy.window, text), 1)
        visible = torch.arange(columns.old + n - window, columns.old + n, device=q.device) + 1
        return attention.weights(q[:, n - window :], columns.k, visible).sum(dim=0).mean(dim=0) / len(q)

    def _choose_vision(
        self, columns: Columns, attn: Tensor | None, counts: EntryCounts, layer_idx: int, i: int
    ) -> tuple[Tensor, Tensor]:
        """Columns [n] of the image entries that stay, ascending, and which of them are the core, bool [n]."""
        past = columns.past.vision
        index = torch.cat((torch.arange(past, device=columns.k.device), columns.old + self.tokens[i].vision))
        selection = self.policy.vision_at(layer_idx)
        if attn is None or selection is None:
            return index, torch.ones_like(index, dtype=torch.bool)
        count = counts.vision - past
        candidates = columns.candidates(index, attn, count, layer_idx, self.turns[i].sample)
        scores, position = selection.scores(candidates), columns.position[0, index]
        best = past + best_first(scores[past:], position[past:])[:count]
        kept = torch.cat((torch.arange(past, device=best.device), best.sort().values))
        core_first = best_first(selection.core_scores(candidates)[kept], position[kept])
        core = torch.zeros_like(kept, dtype=torch.bool).index_fill_(0, core_first[: counts.core], True)
        return index[kept], core

    def _choose_tail(
        self, columns: Columns, q: Tensor, tail: Tensor, layer_idx: int, i: int
    ) -> tuple[Tensor, Tensor | None]:
        """Of the tail's columns [n], those that stay in each head, [H_kv, n'], and their scores."""
        budget, plan = self.policy.budget_at(layer_idx), self._tail_plan(layer_idx, i)
        if budget is None:
            return tail.expand(len(columns.k), -1), None
        score = self._tail_scores(budget, columns, q, tail)
        if plan.length == len(tail):
            return tail.expand(len(columns.k), -1), score
        position = columns.position[:, tail]
        key = torch.where(position < plan.recent_from, order_key(score, position), LAST)
        keep = key.argsort(dim=1, descending=True)[:, : plan.length].sort(dim=1).values  # [H_kv, n']
        return tail[keep], score.gather(1, keep)

    def _tail_scores(self, budget: TokenBudget, columns: Columns, q: Tensor, tail: Tensor) -> Tensor:
        """Scores [H_kv, n] of the tail's columns [n]: old ones remembered, then the prompt's queries block by block."""
        known = columns.past.tail
        score = budget.start(columns.entries(tail))
        if columns.past_score is not None:
            score[:, :known] = columns.past_score
        wanted = budget.prompt_queries()
        queries = tail[known:] - columns.old  # those of the tail's own new tokens
        own = torch.arange(known, len(tail), device=q.device)
        if wanted != "all":
            skipped = max(len(queries) - wanted, 0)
            queries, own = queries[skipped:], own[skipped:]
        for first in range(0, len(queries), attention.QUERY_BLOCK):
            block = slice(first, first + attention.QUERY_BLOCK)
            visible = columns.old + queries[block] + 1
            weights = attention.weights(q[:, queries[block]], columns.k, visible)[:, :, tail]
            score = budget.score_prompt(score, weights, own[block])
        return score
