"""The prefill pass: attend, score, choose, compact, one layer at a time.

Each layer's entries are chosen and moved into that layer's buffers before the next layer runs. So at its peak prefill
holds the compact cache and the keys and values of one layer, never the full cache (a policy that asks for keys or
values adds a copy of them). Later turns of a conversation come through here as well: their queries see everything that
was kept and themselves causally, and only new image tokens are up for choice.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from minivlm.cache import attention
from minivlm.cache.buffers import LayerBuffers
from minivlm.cache.columns import ColumnClasses, Columns, ComputedTokens, choose_tail, choose_vision, filter_scores
from minivlm.cache.cores import begin_cores
from minivlm.cache.counts import EntryCounts, TailPlan, TurnPlan
from minivlm.cache.policy import check_scores
from minivlm.cache.ranking import best_first
from minivlm.cache.slots import SlotLayout
from minivlm.cache.state import CacheState
from minivlm.transfer import to_device


class PrefillPass:
    """One turn's pass for some rows of the batch; the decoder takes it as its cache.

    A large batch is prefilled in several passes, one after the other, into the same buffers. So a row has two numbers
    here: `row` in the batch, and `i` among the rows of this pass. Nothing here waits for the device: all counts are
    known before.
    """

    def __init__(
        self,
        state: CacheState,
        plans: Sequence[TurnPlan],
        counts: Sequence[Sequence[EntryCounts]],
        rows: range,
    ) -> None:
        self.state, self.policy, self.layers = state, state.policy, state.layers
        self.later = state.num_turns > 1  # there are entries from earlier turns
        self.counts = counts  # of each layer, for the whole batch
        self.rows = rows  # of the batch, those of this pass
        self.plans = [plans[row] for row in rows]
        # Each row's image tokens and then its other tokens, all rows in one copy.
        order = [plan.is_vision.to(torch.uint8).argsort(descending=True, stable=True) for plan in self.plans]
        orders = to_device(pad_sequence(order, batch_first=True), state.device)  # [B, S]
        index = torch.arange(orders.shape[1], device=state.device)
        self.tokens = [
            ComputedTokens(index[: prompt.length], row[: prompt.vision], row[prompt.vision : prompt.length])
            for row, prompt in zip(orders, (plan.prompt for plan in self.plans), strict=True)
        ]
        # Per layer and row, which of the turn's tokens it computed, [S']: for whoever watches.
        self.computed: list[list[Tensor]] = []
        self._filter_scores: list[Tensor] = []  # per row, of the layer that has just run
        self._seen: dict[tuple[int, EntryCounts, int], tuple[ColumnClasses, Tensor]] = {}  # see `_of_tokens`

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
            for i, plan in enumerate(self.plans):
                tokens = self.tokens[i]
                count = min(inputs.keep(plan.prompt), len(tokens.vision))
                scores = torch.zeros(0, device=embeds.device)
                if len(tokens.vision):
                    scores = inputs.scores(embeds[i, tokens.vision], count)
                    check_scores(scores, (len(tokens.vision),), inputs, "scores")
                left.append(self._drop(i, scores, count))
            index = pad_sequence(left, batch_first=True)
            embeds = embeds.gather(1, index[..., None].expand(-1, -1, embeds.shape[-1]))
        positions = [plan.first_position + tokens.index for plan, tokens in zip(self.plans, self.tokens, strict=True)]
        padded = pad_sequence(positions, batch_first=True)
        return embeds[:, : padded.shape[1]], padded

    def attend(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend to q [B, H, S, D], k and v [B, H_kv, S, D] of the turn's tokens -> [B, H, S, D]; store what stays."""
        self.computed.append([tokens.index for tokens in self.tokens])
        columns = [
            self._columns(layer_idx, i, q[i, :, :n], k[i, :, :n], v[i, :, :n]) for i, n in enumerate(self.lengths)
        ]
        if self.later:
            out = torch.zeros_like(q)
            for i, each in enumerate(columns):
                out[i, :, : each.q.shape[1]] = attention.prefill_after(each.q[None], each.k[None], each.v[None])[0]
        else:
            out = attention.prefill(q, k, v)
        buffers = self._arrange(layer_idx, k)
        self._filter_scores = []
        for i, each in enumerate(columns):
            self._store(buffers, i, each)
        if layer_idx == self.state.config.num_hidden_layers - 1:
            self.state.next_place.copy_(self.state.counts[3])  # after the entries that stay
            begin_cores(self.state)
        return out

    def survivors(self, layer_idx: int) -> Tensor | None:
        """The tokens [B, S'] that go on after this layer, right-padded with the first one; None if all do."""
        prompt_filter = self.policy.filter_after(layer_idx)
        if prompt_filter is None or layer_idx == self.state.config.num_hidden_layers - 1:
            return None
        left = [
            self._drop(i, scores, prompt_filter.keep(plan.prompt))
            for i, (scores, plan) in enumerate(zip(self._filter_scores, self.plans, strict=True))
        ]
        return pad_sequence(left, batch_first=True)

    def _drop(self, i: int, scores: Tensor, count: int) -> Tensor:
        """Let the `count` best of a row's image tokens, by scores [n], go on; where all that is left stood, [S']."""
        self.tokens[i], left = self.tokens[i].after_dropping_all_but(best_first(scores)[:count])
        return left

    # --- one layer ---------------------------------------------------------------------------------------------------

    def _columns(self, layer_idx: int, i: int, q: Tensor, k: Tensor, v: Tensor) -> Columns:
        """The old entries of one row and its new ones, k and v [H_kv, S', D]."""
        past, past_score = EntryCounts(), None
        if self.later:
            counts, tail = self.layers[layer_idx].counts[self.rows[i]], self._tail_plan(layer_idx, i).past
            past = EntryCounts(counts.vision, counts.core, counts.system, tail)
        classes, position = self._of_tokens(i, past)
        position = position.expand(len(k), -1)  # [H_kv, S']
        if self.later:
            buffers, row = self.layers[layer_idx], self.rows[i]
            slots = buffers.layout.live(past, past.tail, self.state.next_place[layer_idx, row])  # [H_kv, n]
            head = torch.arange(len(k), device=k.device)[:, None]
            k = torch.cat((buffers.k[row][head, slots], k), dim=1)
            v = torch.cat((buffers.v[row][head, slots], v), dim=1)
            position = torch.cat((buffers.position[row][head, slots], position), dim=1)
            if buffers.score is not None:
                past_score = buffers.score[row][head, slots[:, past.fixed :] - buffers.layout.tail_start]
        return Columns(q, k, v, position, classes, past, past_score, layer_idx, self.plans[i].sample)

    def _of_tokens(self, i: int, past: EntryCounts) -> tuple[ColumnClasses, Tensor]:
        """What depends on a row's tokens alone, and is the same in many layers: classes, and new positions [S']."""
        key = i, past, len(self.tokens[i])
        if key not in self._seen:
            tokens, plan = self.tokens[i], self.plans[i]
            classes = ColumnClasses.of(past, tokens, plan.system, self.policy.whole_cache)
            self._seen[key] = classes, (plan.first_position + tokens.index).int()
        return self._seen[key]

    def _tail_plan(self, layer_idx: int, i: int) -> TailPlan:
        return self.plans[i].tails[self.state.budget_group[layer_idx]]

    def _arrange(self, layer_idx: int, like: Tensor) -> LayerBuffers:
        """The layer's buffers, the old ones if they fit, with room for what each row will hold."""
        state, counts = self.state, self.counts[layer_idx]
        layout, old = SlotLayout.of(counts, state.bucket_size), None
        if layer_idx < len(self.layers):
            old = self.layers[layer_idx].layout
            layout = old.grown(layout) if state.gather else layout
        if layout != old:
            del self.layers[layer_idx : layer_idx + 1]  # before the new ones are made: never hold both
            buffers = LayerBuffers(
                layout,
                len(counts),
                kv_heads=like.shape[1],
                head_dim=like.shape[3],
                scored=self.policy.budget is not None,
                dtype=like.dtype,
                device=like.device,
            )
            self.layers.insert(layer_idx, buffers)
        buffers = self.layers[layer_idx]
        buffers.counts = counts
        buffers.mark_kept(slice(self.rows.start, self.rows.stop), state.counts[0, layer_idx])
        return buffers

    def _store(self, buffers: LayerBuffers, i: int, columns: Columns) -> None:
        """Choose one row's entries in one layer and write them where the layout wants them."""
        layer_idx, row, plan, classes = columns.layer_idx, self.rows[i], self.plans[i], columns.classes
        counts = buffers.counts[row]
        selection, budget = self.policy.vision_at(layer_idx), self.policy.budget_at(layer_idx)
        stays = buffers.layout.prefilled(counts)

        # 1. The attention that scores image entries, if anything is scored by it; and the scores of a filter.
        attn = None
        prompt_filter = self.policy.filter_after(layer_idx)
        if (selection is not None or prompt_filter is not None) and len(classes.vision):
            new_text = len(self.tokens[i].text) - plan.system
            attn = columns.mean_attention(window=max(min(self.policy.window, new_text), 1))  # [M]
        if prompt_filter is not None:
            self._filter_scores.append(filter_scores(prompt_filter, columns, attn, prompt_filter.keep(plan.prompt)))

        # 2. The entries that no step evicts, and which of them are the core. Under a whole-cache budget there are none.
        vision = classes.vision
        if selection is not None and attn is not None:
            vision, core = choose_vision(selection, columns, attn, counts)
            buffers.mark_core(row, core)
        fixed = torch.cat((vision, classes.system))
        if attn is not None:
            buffers.vision_attn[row, stays.start :] = attn[fixed]

        # 3. The entries of the tail that stay, in each head others if a budget evicts some.
        tail_by_head = None
        if budget is not None and buffers.score is not None:
            tail_by_head, score = choose_tail(budget, columns, self._tail_plan(layer_idx, i))
            buffers.score[row, :, : counts.tail] = score

        # 4. All of them into place, without a second copy of what stays.
        kept, into = (columns.k, columns.v), (buffers.k[row, :, stays], buffers.v[row, :, stays])
        if tail_by_head is None:
            index = torch.cat((fixed, classes.tail))  # [n]
            for entries, buffer in zip(kept, into, strict=True):
                torch.index_select(entries, 1, index, out=buffer)
            buffers.position[row, :, stays] = columns.position[:, index]
        else:
            index = torch.cat((fixed.expand(len(columns.k), -1), tail_by_head), dim=1)  # [H_kv, n]
            by_channel = index[..., None].expand(-1, -1, columns.k.shape[2])  # [H_kv, n, D]
            for entries, buffer in zip(kept, into, strict=True):
                torch.gather(entries, 1, by_channel, out=buffer)
            buffers.position[row, :, stays] = columns.position.gather(1, index)
