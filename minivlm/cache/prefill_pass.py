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
from minivlm.cache.columns import Columns, ComputedTokens, choose_tail, choose_vision, filter_scores
from minivlm.cache.counts import EntryCounts, TailPlan, TurnPlan, plan_entries
from minivlm.cache.policy import check_scores
from minivlm.cache.ranking import best_first
from minivlm.cache.state import CacheState


class PrefillPass:
    """One turn's pass for some rows of the batch; the decoder takes it as its cache.

    A large batch is prefilled in several passes, one after the other, into the same buffers. So a row has two numbers
    here: `row` in the batch, and `i` among the rows of this pass.
    """

    def __init__(self, state: CacheState, plans: Sequence[TurnPlan], rows: range) -> None:
        self.state, self.policy, self.layers = state, state.policy, state.layers
        self.later = state.num_turns > 1  # there are entries from earlier turns
        self.all_plans = plans  # of the whole batch
        self.rows = rows  # of the batch, those of this pass
        self.plans = [plans[row] for row in rows]
        device = state.device
        self.tokens = [
            ComputedTokens(torch.arange(len(plan.is_vision), device=device), plan.is_vision.to(device))
            for plan in self.plans
        ]
        # Per layer and row, which of the turn's tokens it computed, [S']: for whoever watches.
        self.computed: list[list[Tensor]] = []
        self._filter_scores: list[Tensor] = []  # per row, of the layer that has just run

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
                self.tokens[i], index = tokens.after_dropping_all_but(best_first(scores, tokens.vision)[:count])
                left.append(index)
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
        counts = [self._plan(layer_idx, row) for row in range(len(self.all_plans))]
        buffers = self._allocate(layer_idx, counts, k)
        self._filter_scores = []
        for i, each in enumerate(columns):
            self._store(buffers, i, each)
        buffers.list_core()
        return out

    def survivors(self, layer_idx: int) -> Tensor | None:
        """The tokens [B, S'] that go on after this layer, right-padded with the first one; None if all do."""
        prompt_filter = self.policy.filter_after(layer_idx)
        if prompt_filter is None or layer_idx == self.state.config.num_hidden_layers - 1:
            return None
        left = []
        for i, (tokens, plan) in enumerate(zip(self.tokens, self.plans, strict=True)):
            best = best_first(self._filter_scores[i], tokens.vision)[: prompt_filter.keep(plan.prompt)]
            self.tokens[i], index = tokens.after_dropping_all_but(best)
            left.append(index)
        return pad_sequence(left, batch_first=True)

    # --- one layer ---------------------------------------------------------------------------------------------------

    def _columns(self, layer_idx: int, i: int, q: Tensor, k: Tensor, v: Tensor) -> Columns:
        """The old entries of one row and its new ones, k and v [H_kv, S', D]."""
        position = (self.plans[i].first_position + self.tokens[i].index).int().expand(len(k), -1)
        past, past_score = EntryCounts(), None
        if self.later:
            buffers, row, tail = self.layers[layer_idx], self.rows[i], self._tail_plan(layer_idx, i).past
            counts = buffers.counts[row]
            past = EntryCounts(counts.vision, counts.core, counts.system, tail)
            slots = buffers.layout.live(counts, tail, buffers.write_slot[row])  # [H_kv, n]
            head = torch.arange(len(k), device=k.device)[:, None]
            k = torch.cat((buffers.k[row][head, slots], k), dim=1)
            v = torch.cat((buffers.v[row][head, slots], v), dim=1)
            position = torch.cat((buffers.position[row][head, slots], position), dim=1)
            if buffers.score is not None:
                past_score = buffers.score[row][head, slots[:, counts.fixed :] - buffers.layout.tail_start]
        return Columns(q, k, v, position, past, past_score, self.tokens[i], layer_idx, self.plans[i].sample)

    def _tail_plan(self, layer_idx: int, i: int) -> TailPlan:
        return self.plans[i].tails[self.state.budget_group[layer_idx]]

    def _plan(self, layer_idx: int, row: int) -> EntryCounts:
        """What a row of the batch will hold in a layer: counts alone, so it is known before any pass has run."""
        past = self.layers[layer_idx].counts[row] if self.later else EntryCounts()
        return plan_entries(self.policy, layer_idx, self.state.budget_group[layer_idx], self.all_plans[row], past)

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

    def _store(self, buffers: LayerBuffers, i: int, columns: Columns) -> None:
        """Choose one row's entries in one layer and write them where the layout wants them."""
        layer_idx, row, plan = columns.layer_idx, self.rows[i], self.plans[i]
        counts = buffers.counts[row]

        # 1. The attention that scores image entries, if anything is scored by it; and the scores of a filter.
        attn = None
        prompt_filter = self.policy.filter_after(layer_idx)
        if (self.policy.vision is not None or prompt_filter is not None) and columns.num_vision:
            new_text = len(columns.tokens.text) - plan.system
            attn = columns.mean_attention(window=max(min(self.policy.window, new_text), 1))  # [M]
        if prompt_filter is not None:
            self._filter_scores.append(filter_scores(prompt_filter, columns, attn, prompt_filter.keep(plan.prompt)))

        # 2. The entries that no step evicts, and which of them are the core. Under a whole-cache budget there are none.
        if self.policy.whole_cache:
            fixed = columns.vision[:0]
            core = torch.zeros(0, dtype=torch.bool, device=fixed.device)
            tail = torch.arange(columns.k.shape[1], device=fixed.device)
        else:
            vision, core = choose_vision(self.policy.vision_at(layer_idx), columns, attn, counts)
            fixed = torch.cat((vision, columns.system(plan.system)))
            tail = columns.tail(plan.system)

        # 3. The entries of the tail that stay in each head.
        budget = self.policy.budget_at(layer_idx)
        tail_by_head, score = choose_tail(budget, columns, tail, self._tail_plan(layer_idx, i))

        # 4. All of them into place. `gather` writes there directly: no second copy of what stays.
        index = torch.cat((fixed.expand(len(columns.k), -1), tail_by_head), dim=1)  # [H_kv, n]
        stays = buffers.layout.prefilled(counts)
        by_channel = index[..., None].expand(-1, -1, columns.k.shape[2])  # [H_kv, n, D]
        torch.gather(columns.k, 1, by_channel, out=buffers.k[row, :, stays])
        torch.gather(columns.v, 1, by_channel, out=buffers.v[row, :, stays])
        buffers.position[row, :, stays] = columns.position.gather(1, index)
        buffers.mark_core(row, core)
        if attn is not None:
            buffers.vision_attn[row, stays.start :] = attn[fixed]
        if score is not None and buffers.score is not None:
            buffers.score[row, :, : counts.tail] = score
