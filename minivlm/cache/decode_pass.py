"""The decode pass: one token of each row, against everything that takes part in a step of its kind.

A step writes its token into the place that the previous step's eviction freed, or into the next unused one, attends,
and only then chooses its own victim. Everything that depends on the step is read from tables by a tensor: no buffer
grows or moves, and nothing waits for the device. A row that has finished writes too, always where its next token would
go, which nothing reads: its place does not move on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minivlm.cache import attention
from minivlm.cache.buffers import LayerBuffers
from minivlm.cache.policy import Entries, TokenBudget, check_scores
from minivlm.cache.ranking import LAST, order_key
from minivlm.cache.state import CacheState, StepKind


class DecodePass:
    """One decode step; the decoder takes it as its cache."""

    def __init__(self, state: CacheState, kind: StepKind) -> None:
        self.state, self.kind = state, kind
        self.position = state.position.int()  # [B, 1]
        step = state.stored[:, None]  # [B, 1]
        # For each distinct budget: entries used, whether one is evicted, first position that is protected; each [B, 1].
        self.numbers = [[numbers.gather(1, step) for numbers in table] for table in state.tables]
        self._next_places: list[Tensor] = []  # [B, H_kv] of each layer that has run

    def survivors(self, layer_idx: int) -> None:
        """A step drops no hidden states."""
        return None

    def attend(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One token per row: q [B, H, 1, D], k and v [B, H_kv, 1, D] -> [B, H, 1, D]."""
        state, buffers = self.state, self.state.layers[layer_idx]
        budget = state.policy.budget_at(layer_idx)
        used, evicts, protected_from = self.numbers[state.budget_group[layer_idx]]
        place = state.next_place[layer_idx]  # [B, H_kv]

        # 1. The token takes its place, and attends; the weights are wanted where a budget or a refresh scores by them.
        want_weights = budget is not None or self.kind == "refresh"
        out, weights, tail_start = self._write_and_attend(layer_idx, (q, k, v), place, used, want_weights)

        # 2. A refresh notes what attention the image entries get, for the choice of the core.
        if self.kind == "refresh":
            assert weights is not None
            attn = weights[:, :, :tail_start].sum(dim=1) / q.shape[1]  # [B, tail_start]
            buffers.vision_attn.copy_(torch.where(state.active[:, None], attn, buffers.vision_attn))

        # 3. The next token goes to the first unused place, or to that of this step's victim.
        next_place = used.expand_as(place)
        if budget is not None:
            assert weights is not None
            entry = Entries(self.position[:, None].expand(k.shape[:3]), k, v)
            victim = self._victim(buffers, budget, weights[:, :, tail_start:], entry, place, used, protected_from)
            next_place = torch.where(evicts.bool(), victim, next_place)
        self._next_places.append(next_place)
        return out

    def finish(self) -> None:
        """After the last layer: where each row's next token goes, in all layers at once."""
        active = self.state.active[:, None]  # [B, 1]
        next_place = torch.where(active, torch.stack(self._next_places), self.state.next_place)
        self.state.next_place.copy_(next_place)

    def _write_and_attend(
        self, layer_idx: int, token: tuple[Tensor, Tensor, Tensor], place: Tensor, used: Tensor, want_weights: bool
    ) -> tuple[Tensor, Tensor | None, int]:
        """Output, weights [B, H_kv, n] if they are wanted, and the first of the tail's columns among these n."""
        state, buffers = self.state, self.state.layers[layer_idx]
        tail_start = buffers.layout.tail_start
        if state.decode_split is not None:
            fixed, _, listed, _ = state.counts[:, layer_idx]
            core_slots = self._core_slots(layer_idx)
            out, weights = state.decode_split(
                (*token, self.position),
                (buffers.k, buffers.v, buffers.position),
                place,
                used,
                fixed if core_slots is None else listed,
                tail_start,
                want_weights,
                core_slots,
            )
            return out, weights, tail_start if core_slots is None else core_slots.shape[1]

        q, k, v = token
        self._write(buffers, place, k, v)
        if state.static:
            keys, values, live, tail_start = self._reading(layer_idx, buffers, used)
            return *attention.decode_static(q, keys, values, live, want_weights), tail_start
        core = buffers.in_core_step > 0 if self.kind == "core" else None
        spans = self._spans(layer_idx, buffers)
        return *attention.decode_plain(q, buffers.k, buffers.v, spans, core, want_weights), tail_start

    def _write(self, buffers: LayerBuffers, place: Tensor, k: Tensor, v: Tensor) -> None:
        """Put the step's token into its place [B, H_kv] in the tail.

        By indexed assignment: of a `scatter_` inductor makes two copies of the whole buffer.
        """
        batch, kv_heads = place.shape
        row = torch.arange(batch, device=k.device)[:, None]
        head = torch.arange(kv_heads, device=k.device)
        where = (row, head, buffers.layout.tail_start + place)  # [B, H_kv]
        buffers.position[where] = self.position.expand_as(place)
        for buffer, new in ((buffers.k, k), (buffers.v, v)):
            buffer[where] = new[:, :, 0]

    def _core_slots(self, layer_idx: int) -> Tensor | None:
        """The slots [B, width] left of the tail that a core step reads, if this is one that reads by index."""
        core_slots = self.state.core_slots
        return core_slots[layer_idx] if self.kind == "core" and core_slots is not None else None

    def _reading(self, layer_idx: int, buffers: LayerBuffers, used: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
        """What a step of fixed shape passes over: keys and values [B, H_kv, n, D], which of the n are live [B, n], and
        where among them the tail starts."""
        layout = buffers.layout
        fixed, _, num_listed, _ = self.state.counts[:, layer_idx]  # each [B, 1]
        slots = torch.arange(layout.slots, device=used.device)
        live = (slots >= layout.tail_start - fixed) & (slots < layout.tail_start + used)
        if self.kind == "core":
            live = live & (buffers.in_core_step > 0)
        core_slots = self._core_slots(layer_idx)
        if core_slots is None:
            return buffers.k, buffers.v, live, layout.tail_start
        # Only what the core step needs, by index.
        batch, width = core_slots.shape
        listed = torch.arange(width, device=used.device) < num_listed  # [B, width]; the rest of the list is padding
        index = torch.cat((core_slots, slots[layout.tail_start :].expand(batch, -1)), dim=1)  # [B, n]
        row = torch.arange(batch, device=used.device)[:, None, None]
        head = torch.arange(buffers.k.shape[1], device=used.device)[:, None]
        where = (row, head, index[:, None])  # indexing, not `gather`: the compiler fuses it into the sums over D and n
        live = torch.cat((listed, live[:, layout.tail_start :]), dim=1)
        return buffers.k[where], buffers.v[where], live, width

    def _spans(self, layer_idx: int, buffers: LayerBuffers) -> list[tuple[int, int]]:
        """First and end of each row's live slots, this step's token included."""
        start, step = buffers.layout.tail_start, self.state.steps
        return [
            (start - counts.fixed, start + self.state.tail_length(layer_idx, row, step) + 1)
            for row, counts in enumerate(buffers.counts)
        ]

    def _victim(
        self,
        buffers: LayerBuffers,
        budget: TokenBudget,
        attn: Tensor,
        entry: Entries,
        place: Tensor,
        used: Tensor,
        protected_from: Tensor,
    ) -> Tensor:
        """Score the tail by this step's attention [B, H_kv, tail slots]; the worst unprotected entry of each head
        [B, H_kv], counted from the tail's start."""
        assert buffers.score is not None
        slots = torch.arange(attn.shape[2], device=attn.device)
        live = (slots < used)[:, None]  # [B, 1, tail slots]
        is_new = slots == place[..., None]  # [B, H_kv, tail slots]
        first_scores = check_scores(budget.first_scores(entry), tuple(entry.positions.shape), budget, "first_scores")
        score = torch.where(is_new, first_scores, buffers.score)
        score = budget.score_step(score, attn, live, is_new)
        check_scores(score, tuple(attn.shape), budget, "score_step")
        buffers.score.copy_(torch.where(live & self.state.active[:, None, None], score, buffers.score))
        position = buffers.position[:, :, buffers.layout.tail_start :]
        key = torch.where(live & (position < protected_from[..., None]), order_key(score, position), LAST)
        return key.argmin(dim=2)
