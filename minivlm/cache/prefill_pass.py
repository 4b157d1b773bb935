"""The prefill pass: attend, score, choose, compact, one layer at a time.

Each layer's entries are chosen and moved into that layer's buffers before the next layer runs, so at its peak prefill
holds the compact cache and the keys and values of one layer, never the full cache.  Later turns of a conversation
come through here as well: their queries see everything kept and themselves causally, and only new vision tokens are
up for choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minivlm.cache import attention
from minivlm.cache.buffers import Layer, Row
from minivlm.cache.policy import Policy, Prompt
from minivlm.cache.ranking import LAST, best_first, order_key


@dataclass(frozen=True)
class Turn:
    """What the host knows of one sequence's new tokens before any layer runs."""

    sample: int
    start: int  # position of the first new token
    is_vision: Tensor  # bool [S_b], on the CPU
    system: int  # tokens of the system prefix among them; 0 in a later turn
    past_tail: int  # tail entries there from earlier turns
    tail: int  # tail entries that stay
    recent_from: int  # tail entries from this position on are protected
    capacity: int  # tail entries that the answer can ever need at once

    @property
    def prompt(self) -> Prompt:
        return Prompt(len(self.is_vision), int(self.is_vision.sum()))


class Rows:
    """The rows of one sequence's hidden states that are still computed, and which of them are vision."""

    def __init__(self, index: Tensor, is_vision: Tensor) -> None:
        self.index = index  # [S'], turn-relative
        self.vision, self.other = is_vision.nonzero()[:, 0], (~is_vision).nonzero()[:, 0]

    def __len__(self) -> int:
        return len(self.index)


@dataclass
class Columns:
    """All entries of one sequence in one layer before anything is evicted: earlier ones first, then the new."""

    k: Tensor  # [H_kv, M, D]
    v: Tensor  # [H_kv, M, D]
    position: Tensor  # [H_kv, M]
    score: Tensor | None  # [H_kv, past tail], what the token budget remembers
    past: Row  # the earlier ones, by kind, in the order of the layout

    @property
    def before(self) -> int:
        return self.past.fixed + self.past.tail


class Prefill:
    """One turn's pass for the sequences of `span`; to be handed to the decoder as its cache.

    A large batch is prefilled in several passes, one after the other, into the same buffers.  `lengths` are the rows of
    each sequence that go on after the last layer; the last of them yields the logits.
    """

    def __init__(
        self,
        policy: Policy,
        layers: list[Layer],
        turns: Sequence[Turn],
        span: range,
        later: bool,
        num_layers: int,
        indexed: bool,
        device: torch.device,
    ) -> None:
        self.policy, self.layers, self.later, self.num_layers, self.indexed = policy, layers, later, num_layers, indexed
        self.batch, self.span = turns, span
        self.turns = [turns[b] for b in span]
        self.rows = [Rows(torch.arange(len(t.is_vision), device=device), t.is_vision.to(device)) for t in self.turns]
        self.whole = policy.budget is not None and policy.budget.over == "all"
        self._filter_scores: list[Tensor] = []

    @property
    def lengths(self) -> list[int]:
        return [len(rows) for rows in self.rows]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of the turn's tokens: q [B, H, S, D], k and v [B, H_kv, S, D] -> [B, H, S, D]; stores what stays."""
        columns = [self._columns(layer, i, k[i, :, :n], v[i, :, :n]) for i, n in enumerate(self.lengths)]
        if self.later:
            out = torch.zeros_like(q)
            for i, (c, n) in enumerate(zip(columns, self.lengths)):
                out[i, :, :n] = attention.prefill_after(q[i : i + 1, :, :n], c.k[None], c.v[None])[0]
        else:
            out = attention.prefill(q, k, v)
        store = self._allocate(layer, [self._plan(layer, b) for b in range(len(self.batch))], k)
        self._filter_scores = []
        for i, c in enumerate(columns):
            self._store(store, layer, i, c, q[i, :, : len(self.rows[i])])
        store.list_core()
        return out

    def survivors(self, layer: int) -> Tensor | None:
        """The rows [B, S'] that go on after the filter's layer, right-padded with row 0; None after any other."""
        chosen = self.policy.filter
        if chosen is None or layer != chosen.layer - 1 or layer == self.num_layers - 1:
            return None
        kept = []
        for i, (rows, turn) in enumerate(zip(self.rows, self.turns)):
            best = best_first(self._filter_scores[i], rows.vision)[: chosen.keep(turn.prompt)]
            index = torch.cat((rows.other, rows.vision[best])).sort().values
            is_vision = torch.isin(index, rows.vision[best])
            kept.append(index)
            self.rows[i] = Rows(rows.index[index], is_vision)
        return torch.nn.utils.rnn.pad_sequence(kept, batch_first=True)

    def _columns(self, layer: int, i: int, k: Tensor, v: Tensor) -> Columns:
        position = (self.turns[i].start + self.rows[i].index).int().expand(len(k), -1)
        if not self.later:
            return Columns(k, v, position, None, Row(0, 0, 0, 0, 0))
        held, b, tail = self.layers[layer], self.span[i], self.turns[i].past_tail
        slots, heads = held.live_slots(b, tail), torch.arange(len(k), device=k.device)[:, None]
        row = held.rows[b]
        return Columns(
            k=torch.cat((held.k[b][heads, slots], k), dim=1),
            v=torch.cat((held.v[b][heads, slots], v), dim=1),
            position=torch.cat((held.position[b][heads, slots], position), dim=1),
            score=None if held.score is None else held.score[b][heads, slots[:, row.fixed :] - held.tail],
            past=Row(row.vision, row.core, row.system, tail, 0),
        )

    def _plan(self, layer: int, b: int) -> Row:
        """What a sequence of the batch will hold in a layer: counts alone, so known before any pass has run."""
        turn, past = self.batch[b], self.layers[layer].rows[b] if self.later else Row(0, 0, 0, 0, 0)
        if self.whole:
            return Row(0, 0, 0, turn.tail, turn.capacity)
        new = turn.prompt.vision
        if self.policy.filter is not None and layer >= self.policy.filter.layer:
            new = min(self.policy.filter.keep(turn.prompt), new)
        core = new
        if self.policy.vision is not None:
            new = min(self.policy.vision.keep(turn.prompt), new)
            core = min(self.policy.vision.core(turn.prompt), new)
        return Row(past.vision + new, past.core + core, past.system + turn.system, turn.tail, turn.capacity)

    def _allocate(self, layer: int, plans: list[Row], like: Tensor) -> Layer:
        scored = self.policy.budget is not None
        if layer < len(self.layers) and self.layers[layer].fits(plans, scored):
            self.layers[layer].arrange(plans)
            return self.layers[layer]
        if layer < len(self.layers):
            del self.layers[layer]  # before the new one is made: never hold both
        self.layers.insert(
            layer, Layer(plans, like.shape[1], like.shape[3], scored, self.indexed, like.dtype, like.device)
        )
        return self.layers[layer]

    def _store(self, store: Layer, layer: int, i: int, c: Columns, q: Tensor) -> None:
        """Choose one sequence's entries in one layer and write them where the layout wants them."""
        b = self.span[i]
        plan, rows, past, turn = store.rows[b], self.rows[i], c.past, self.turns[i]
        filtering = self.policy.filter is not None and layer == self.policy.filter.layer - 1
        attended = None
        if (self.policy.vision is not None or filtering) and past.vision + len(rows.vision):
            attended = self._attended(c, q, len(rows.other) - turn.system)  # [M]
        if filtering:
            none = torch.zeros(0, device=q.device)
            self._filter_scores.append(attended[c.before + rows.vision] if len(rows.vision) else none)
        if self.whole:
            fixed = core = rows.index[:0]
            tail = torch.arange(c.before + len(rows), device=q.device)
        else:
            fixed, core = self._fixed(plan, c, rows, attended, layer, turn)
            new_text = rows.other[turn.system :]
            tail = torch.cat((torch.arange(past.fixed, c.before, device=q.device), c.before + new_text))
        heads = torch.arange(len(c.k), device=q.device)[:, None]
        tail, score = self._tail(c, rows, q, tail, turn)
        index = torch.cat((fixed.expand(len(heads), -1), tail), dim=1)  # [H_kv, n]
        window = slice(store.tail - plan.fixed, store.tail + plan.tail)
        entries = index[..., None].expand(-1, -1, c.k.shape[2])  # [H_kv, n, D]
        torch.gather(c.k, 1, entries, out=store.k[b, :, window])  # in place: no second copy of what stays
        torch.gather(c.v, 1, entries, out=store.v[b, :, window])
        store.position[b, :, window] = c.position[heads, index]
        store.mark_core(b, core)
        if attended is not None:
            store.vision_row[b, store.tail - plan.fixed :] = attended[fixed]
        if score is not None:
            store.score[b, :, : plan.tail] = score

    def _attended(self, c: Columns, q: Tensor, text: int) -> Tensor:
        """Attention [M] of the last rows, averaged over all query heads and over the rows of the score window."""
        n = q.shape[1]
        window = max(min(self.policy.window, text), 1)
        visible = torch.arange(c.before + n - window, c.before + n, device=q.device) + 1
        return attention.rows(q[:, n - window :], c.k, visible).sum(dim=0).mean(dim=0) / len(q)

    def _fixed(
        self, plan: Row, c: Columns, rows: Rows, attended: Tensor | None, layer: int, turn: Turn
    ) -> tuple[Tensor, Tensor]:
        """Columns of the vision entries that stay, ascending, and of the system entries; and which of the former are the core."""
        past = c.past
        vision = torch.cat((torch.arange(past.vision, device=c.k.device), c.before + rows.vision))
        core = torch.ones_like(vision, dtype=torch.bool)
        if attended is not None and self.policy.vision is not None:
            scores = self.policy.vision.scores(attended[vision], layer, turn.sample)
            position = c.position[0, vision]
            best = past.vision + best_first(scores[past.vision :], position[past.vision :])[: plan.vision - past.vision]
            kept = torch.cat((torch.arange(past.vision, device=best.device), best.sort().values))
            vision, order = vision[kept], best_first(scores[kept], position[kept])
            core = torch.zeros_like(vision, dtype=torch.bool).index_fill_(0, order[: plan.core], True)
        system = torch.arange(past.vision, past.fixed, device=c.k.device)
        return torch.cat((vision, system, c.before + rows.other[: turn.system])), core

    def _tail(self, c: Columns, rows: Rows, q: Tensor, tail: Tensor, turn: Turn) -> tuple[Tensor, Tensor | None]:
        """Columns [H_kv, n] of the tail entries that stay in each head, and their scores."""
        budget, kv_heads = self.policy.budget, len(c.k)
        if budget is None:
            return tail.expand(kv_heads, -1), None
        known = c.past.tail
        score = budget.start(c.position[:, tail])
        if c.score is not None:
            score[:, :known] = c.score
        if budget.prompt_rows != "none":
            queries = (
                tail[known:] - c.before if budget.prompt_rows == "over" else rows.index.new_tensor([q.shape[1] - 1])
            )
            own = torch.arange(known, known + len(queries), device=q.device)
            for first in range(0, len(queries), attention.ROW_BLOCK):
                block = queries[first : first + attention.ROW_BLOCK]
                weights = attention.rows(q[:, block], c.k, c.before + block + 1)[:, :, tail]
                score = budget.score_rows(score, weights, own[first : first + attention.ROW_BLOCK])
        if turn.tail == len(tail):
            return tail.expand(kv_heads, -1), score
        position = c.position[:, tail]
        key = torch.where(position < turn.recent_from, order_key(score, position), LAST)
        keep = key.argsort(dim=1, descending=True)[:, : turn.tail].sort(dim=1).values  # [H_kv, n]
        return tail[keep], score.gather(1, keep)
