"""A-VL stated once more, slowly and plainly, as the oracle the real cache is tested against.

One sequence, explicit softmax matrices, and one Python list of live positions per layer and key/value
head.  Row p of a layer's key and value tables is original position p; an evicted entry leaves the list
and its rows become NaN, so whatever still read it would show.  Paper: A-VL, AAAI-25, arXiv 2409.14846.

    ref = Reference(model, Settings(vision=True, vision_interval=3, text="h2o"))
    ref.prefill(embeds, is_vision)        # [L, C], [L] -> logits [V]
    tokens = ref.generate(20)             # greedy; or ref.step(token), one by one
    ref.turn(ref.embed([tokens[-1], ...]), is_vision)    # a later turn starts with the token never fed

What was decided, and how narrowly, lies in `fate`, `vision_kept()`, `cores` and `margins` afterwards.

Where the method's description leaves room, this is read as follows:

- Images of one turn are selected together: N counts all vision tokens that are new in the turn.
- The core of a later turn has the sum over the turns of min(Nc, Nk, what the layer kept) entries.
- The score window is the last min(W, X) rows still in the layer, X the turn's own text tokens, whatever they are.
- Only the first turn has system tokens; of a later turn everything that is not vision is text, even if
  no image came before.
- A later turn is a prefill also to `history` (the quantile leaves the token itself out) and to `direct`
  (only the last row counts).  Whole-cache H2O goes on counting seq over all positions so far.
- The last `recent` text columns are those of the highest positions, on whichever side of an image.
- A turn may not end in a vision token: the filter could drop the row whose logits are wanted.
- Streaming keeps the min(4, B) first and the B - min(4, B) last of a head's columns, B = streaming(seq).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from minivlm.model.llava import Llava

SYSTEM, VISION, TEXT = "system", "vision", "text"
SINKS = 4
# Scores below this are zero to a float32 softmax: between two of them every choice is a tie.
TINY = 1e-25


@dataclass(frozen=True)
class Settings:
    """Names and defaults of the method's description; every rate is the share removed."""

    vision: bool = False
    vision_rate: float = 0.5
    vision_compute_rate: float = 0.6
    vision_interval: int = -1
    score_window: int = 1
    text: str | None = None  # "h2o", "direct" or "history"
    text_rate: float = 0.5
    text_init_cache: int = 20
    text_hh_rate: float = 0.7
    prefill_filter: bool = False  # alone, at filter_layer 2, it is FastV
    filter_layer: int = 3
    filter_rate: float = 0.5
    all_h2o: bool = False
    all_h2o_keep: float = 0.5  # the share of the columns that stay; 0.5 in the original
    streaming: Callable[[int], int] | None = None  # tokens seen so far -> columns that stay

    def __post_init__(self) -> None:
        whole_cache = self.all_h2o + (self.streaming is not None)
        if whole_cache and (whole_cache > 1 or self.vision or self.text or self.prefill_filter):
            raise ValueError("all_h2o and streaming stand alone")
        if self.text not in (None, "h2o", "direct", "history"):
            raise ValueError(f"no text rule {self.text!r}")


class Layer:
    """What one decoder layer remembers."""

    def __init__(self, kv_heads: int, capacity: int, head_dim: int, dtype: torch.dtype) -> None:
        self.keys = torch.full((kv_heads, capacity, head_dim), math.nan, dtype=dtype)  # row p: position p
        self.values = self.keys.clone()
        self.live: list[list[int]] = [[] for _ in range(kv_heads)]  # positions, ascending
        self.score: list[dict[int, float]] = [{} for _ in range(kv_heads)]  # of text (or all) columns
        self.scale: list[dict[int, float]] = [
            {} for _ in range(kv_heads)
        ]  # sum of the terms a score is made of, unsigned
        self.core: list[int] = []  # best first
        self.core_size = 0
        # By position: -2 never here, -1 here, else the call that evicted it.
        self.fate: list[list[int]] = [[] for _ in range(kv_heads)]

    def evict(self, head: int, positions: Sequence[int], call: int) -> None:
        for p in positions:
            self.live[head].remove(p)
            self.score[head].pop(p, None)
            self.scale[head].pop(p, None)
            self.fate[head][p] = call
            self.keys[head, p] = self.values[head, p] = math.nan


@dataclass(frozen=True)
class Attention:
    """One layer's attention in one call, after softmax."""

    rows: list[int]  # the queries' positions
    columns: list[list[int]]  # per key/value head, the keys' positions
    weights: list[Tensor]  # per key/value head [G, rows, columns], G the query heads of the group

    def grouped(self, head: int) -> list[list[float]]:
        """[rows][columns], summed over the query heads of a group."""
        return self.weights[head].double().sum(0).tolist()

    def mean(self, positions: Sequence[int], last: int = 1) -> dict[int, float]:
        """The mean weight of `positions` over all query heads and the `last` rows."""
        total = dict.fromkeys(positions, 0.0)
        for columns, weights in zip(self.columns, self.weights):
            for p, weight in zip(columns, weights[:, -last:].double().mean(1).sum(0).tolist()):
                if p in total:
                    total[p] += weight
        heads = sum(len(weights) for weights in self.weights)
        return {p: weight / heads for p, weight in total.items()}


def best(score: dict[int, float], count: int, scale: dict[int, float] | None = None) -> tuple[list[int], float]:
    """The `count` best positions, best first, and the relative margin to the first loser (inf: no decision)."""
    order = sorted(score, key=lambda p: (-score[p], p))
    winners, losers = order[:count], order[count:]
    if not winners or not losers:
        return winners, math.inf
    pair = winners[-1], losers[0]
    size = max(max(abs(score[p]), scale[p] if scale else 0.0) for p in pair)
    return winners, (score[pair[0]] - score[pair[1]]) / max(size, TINY)


def quantile(values: Sequence[float], q: float) -> float:
    """With linear interpolation, as numpy's and torch's default."""
    ordered = sorted(values)
    place = q * (len(ordered) - 1)
    low = min(int(place), len(ordered) - 1)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


class Reference:
    """The method on one sequence, with the weights of `model` in `dtype`."""

    def __init__(self, model: Llava, settings: Settings, dtype: torch.dtype = torch.float64) -> None:
        self.model = copy.deepcopy(model).to(dtype).requires_grad_(False)
        self.settings, self.dtype, self.config = settings, dtype, model.config.text
        c = self.config
        self.group = c.num_attention_heads // c.num_key_value_heads
        self.layers = [
            Layer(c.num_key_value_heads, c.context_length, c.head_dim, dtype) for _ in range(c.num_hidden_layers)
        ]
        self.kind: list[str] = []  # by position
        self.call = -1  # forward passes so far, less one: step 0 is the first prefill
        self.turn_step = 0  # t, counted from this turn's prefill
        self.logits: list[Tensor] = []  # by call
        self.cores: list[tuple[int, list[list[int]]]] = []  # (call, [layer][positions, best first]), whenever chosen
        self.margins: list[dict[str, list[float]]] = []  # by call: vision, core, filter, text per layer, and logit

    # -- what a caller does ---------------------------------------------------------------------

    def embed(self, token_ids: Sequence[int]) -> Tensor:
        return self.model.language_model.embed_tokens(torch.tensor(token_ids, dtype=torch.long))  # [S, C]

    def prefill(self, embeds: Tensor, is_vision: Sequence[bool]) -> Tensor:
        """The first turn: embeddings [L, C] -> logits [V] of the last row."""
        assert not self.kind, "prefill comes first, and once"
        return self.turn(embeds, is_vision)

    @torch.no_grad()
    def turn(self, embeds: Tensor, is_vision: Sequence[bool]) -> Tensor:
        """One turn's new embeddings [L, C], the last token of the answer before among them -> logits [V]."""
        flags = [bool(v) for v in is_vision]
        if flags[-1]:
            raise ValueError("a turn may not end in a vision token")
        first_turn = not self.kind
        system = (flags.index(True) if True in flags else 1) if first_turn else 0
        kinds = [VISION if v else SYSTEM if i < system else TEXT for i, v in enumerate(flags)]
        rows = self._begin(kinds)
        self.turn_step = 0
        s, n = self.settings, flags.count(True)
        window = max(1, min(s.score_window, kinds.count(TEXT)))
        keep, core, survive = (int((1 - rate) * n) for rate in (s.vision_rate, s.vision_compute_rate, s.filter_rate))

        hidden = embeds.to(self.dtype)
        for i, layer in enumerate(self.layers):
            hidden, attention = self._run(i, hidden, rows, [list(live) for live in layer.live])
            self._prune_columns(i, attention)
            new = [p for p in rows if self.kind[p] == VISION]
            if s.vision:
                kept, self.margins[-1]["vision"][i] = best(attention.mean(new, window), keep)
                self._evict_everywhere(layer, [p for p in new if p not in kept])
                layer.core_size += min(core, len(kept))
                self._choose_core(i, attention, window)
            if s.prefill_filter and i == s.filter_layer - 1:
                winners, self.margins[-1]["filter"][i] = best(attention.mean(new, window), survive)
                stay = [r for r, p in enumerate(rows) if self.kind[p] != VISION or p in winners]
                hidden, rows = hidden[stay], [rows[r] for r in stay]
        return self._finish(hidden, chose_core=s.vision and VISION in self.kind)

    @torch.no_grad()
    def step(self, token: int) -> Tensor:
        """Feed one token -> logits [V]."""
        rows = self._begin([TEXT])
        self.turn_step += 1
        interval = self.settings.vision_interval
        has_core = self.settings.vision and interval > 0 and VISION in self.kind
        refresh = has_core and self.turn_step % interval == 0

        hidden = self.embed([token])
        for i, layer in enumerate(self.layers):
            columns = [list(live) for live in layer.live]
            if has_core and not refresh:
                columns = [[p for p in live if self.kind[p] != VISION or p in layer.core] for live in columns]
            hidden, attention = self._run(i, hidden, rows, columns)
            self._prune_columns(i, attention)
            if refresh:
                self._choose_core(i, attention, 1)
        return self._finish(hidden, chose_core=refresh)

    def generate(self, count: int) -> list[int]:
        """`count` greedy tokens from the last logits on; the last one is not fed."""
        tokens = [int(self.logits[-1].argmax())]
        while len(tokens) < count:
            tokens.append(int(self.step(tokens[-1]).argmax()))
        return tokens

    # -- what a test reads ----------------------------------------------------------------------

    @property
    def fate(self) -> list[list[list[int]]]:
        """[layer][kv_head][position]: the call that evicted the entry; -1 still cached, -2 never entered the layer."""
        return [layer.fate for layer in self.layers]

    def vision_ordinal(self, position: int) -> int:
        """The index of a vision token among all vision tokens of the sequence."""
        return self.kind[:position].count(VISION)

    def vision_kept(self) -> list[list[int]]:
        """[layer][positions] of the vision entries now cached (by head 0; all heads agree unless a whole-cache policy is on)."""
        return [[p for p in layer.live[0] if self.kind[p] == VISION] for layer in self.layers]

    def live_counts(self) -> list[dict[str, int]]:
        """[layer]: entries of each kind in one head; raises if the heads of a layer disagree."""
        counts = []
        for layer in self.layers:
            per_head = [
                {kind: sum(self.kind[p] == kind for p in live) for kind in (SYSTEM, VISION, TEXT)}
                for live in layer.live
            ]
            assert all(count == per_head[0] for count in per_head), per_head
            counts.append(per_head[0])
        return counts

    def first_tie(self, margin: float, logit: float = 0.0) -> int:
        """The first call that took a decision by less than `margin`, or whose two best logits differ by less than `logit`.

        The number of calls so far if there is none.  What such a call *read* is still comparable, its
        logits are; what it evicted, and everything after, is not.
        """
        for call, kinds in enumerate(self.margins):
            if any(min(values) < (logit if kind == "logit" else margin) for kind, values in kinds.items()):
                return call
        return len(self.margins)

    # -- the rules ------------------------------------------------------------------------------

    def _begin(self, kinds: list[str]) -> list[int]:
        """Count the call, enter the new tokens' kinds, and return their positions."""
        rows = list(range(len(self.kind), len(self.kind) + len(kinds)))
        assert rows[-1] < self.config.context_length, "the sequence is longer than the model's context"
        self.kind += kinds
        self.call += 1
        self.margins.append({kind: [math.inf] * len(self.layers) for kind in ("vision", "core", "filter", "text")})
        for layer in self.layers:
            for fate in layer.fate:
                fate += [-2] * len(kinds)
        return rows

    def _finish(self, hidden: Tensor, chose_core: bool) -> Tensor:
        logits = F.linear(self._norm(self.model.language_model.norm, hidden[-1]), self.model.lm_head.weight)
        first, second = logits.double().topk(2).values.tolist()
        self.margins[-1]["logit"] = [first - second]
        self.logits.append(logits)
        if chose_core:
            self.cores.append((self.call, [list(layer.core) for layer in self.layers]))
        return logits

    def _evict_everywhere(self, layer: Layer, positions: Sequence[int]) -> None:
        for head in range(len(layer.live)):
            layer.evict(head, positions, self.call)

    def _choose_core(self, i: int, attention: Attention, window: int) -> None:
        layer = self.layers[i]
        kept = [p for p in layer.live[0] if self.kind[p] == VISION]
        layer.core, self.margins[-1]["core"][i] = best(attention.mean(kept, window), layer.core_size)

    def _prune_columns(self, i: int, attention: Attention) -> None:
        """Whole-cache H2O, streaming or text pruning: score, then evict, each head for itself."""
        s, layer, seq = self.settings, self.layers[i], len(self.kind)
        n_text = self.kind.count(TEXT)
        budget = max(round((1 - s.text_rate) * n_text), s.text_init_cache)
        narrowest = math.inf
        for head, live in enumerate(layer.live):
            if s.streaming:
                room = s.streaming(seq)
                sinks = min(SINKS, room)
                middle = live[sinks : len(live) - (room - sinks)] if len(live) > room else []
                layer.evict(head, middle, self.call)
                continue
            if s.all_h2o:
                columns = list(live)
                self._add_rows(layer, head, attention, (SYSTEM, VISION, TEXT))
                heavy, recent = int(seq * s.all_h2o_keep * 0.25), int(seq * s.all_h2o_keep * 0.75)
            elif s.text:
                columns = [p for p in live if self.kind[p] == TEXT]
                if s.text == "h2o":
                    self._add_rows(layer, head, attention, (TEXT,))
                    heavy = int(budget * s.text_hh_rate)
                elif s.text == "history":
                    self._add_history(layer, head, attention)
                    heavy = budget - budget // 2
                else:
                    layer.score[head] = dict(zip(attention.columns[head], attention.grouped(head)[-1]))
                    heavy = budget
                recent = budget - heavy
            else:
                continue
            if len(columns) > heavy + recent:
                others = columns[: len(columns) - recent]
                score, scale = ({p: table[head].get(p, 0.0) for p in others} for table in (layer.score, layer.scale))
                winners, margin = best(score, heavy, scale)
                layer.evict(head, [p for p in others if p not in winners], self.call)
                narrowest = min(narrowest, margin)
        self.margins[-1]["text"][i] = narrowest

    def _add_rows(self, layer: Layer, head: int, attention: Attention, kinds: Sequence[str]) -> None:
        """H2O: a column's score is the sum of all rows of the given kinds that ever saw it."""
        grouped = attention.grouped(head)
        rows = [grouped[r] for r, p in enumerate(attention.rows) if self.kind[p] in kinds]
        for p, *weights in zip(attention.columns[head], *rows):
            if self.kind[p] in kinds:
                layer.score[head][p] = layer.score[head].get(p, 0.0) + math.fsum(weights)

    def _add_history(self, layer: Layer, head: int, attention: Attention) -> None:
        """A text column's score: its own first weight, then what later rows give it above their quantile."""
        score, scale = layer.score[head], layer.scale[head]
        for own, weights in zip(attention.rows, attention.grouped(head)):
            if self.kind[own] != TEXT:
                continue
            row = {p: w for p, w in zip(attention.columns[head], weights) if self.kind[p] == TEXT and p <= own}
            score[own] = scale[own] = row.pop(own)
            if row:
                decode = self.turn_step > 0
                level = quantile([*row.values(), score[own]] if decode else list(row.values()), self.settings.text_rate)
                for p, weight in row.items():
                    score[p] += weight - level
                    scale[p] += weight + level

    # -- the decoder ----------------------------------------------------------------------------

    def _run(self, i: int, hidden: Tensor, rows: list[int], columns: list[list[int]]) -> tuple[Tensor, Attention]:
        """One decoder layer on hidden [R, C]; `columns` are the earlier entries that take part, per key/value head."""
        block, layer, c = self.model.language_model.layers[i], self.layers[i], self.config
        x = self._norm(block.input_layernorm, hidden)
        q, k, v = (
            F.linear(x, proj.weight).view(len(rows), -1, c.head_dim).transpose(0, 1)  # [H or H_kv, R, D]
            for proj in (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj)
        )
        where = torch.tensor(rows)
        q, k = self._rotate(q, where), self._rotate(k, where)
        layer.keys[:, where], layer.values[:, where] = k, v
        out, weights, columns = [], [], [earlier + rows for earlier in columns]
        for head, read in enumerate(columns):
            layer.live[head] += rows
            for p in rows:
                layer.fate[head][p] = -1
            index = torch.tensor(read)
            keys, values = layer.keys[head, index], layer.values[head, index]  # [n, D]
            scores = q[head * self.group : (head + 1) * self.group] @ keys.T / math.sqrt(c.head_dim)  # [G, R, n]
            scores = scores.to(self._wide).masked_fill(index > where[:, None], -math.inf)
            weights.append(scores.softmax(-1))
            out.append(weights[-1].to(self.dtype) @ values)  # [G, R, D]
        merged = torch.cat(out).transpose(0, 1).reshape(len(rows), -1)  # [R, H * D]
        hidden = hidden + F.linear(merged, block.self_attn.o_proj.weight)
        x = self._norm(block.post_attention_layernorm, hidden)
        mlp = block.mlp
        x = F.silu(F.linear(x, mlp.gate_proj.weight)) * F.linear(x, mlp.up_proj.weight)
        return hidden + F.linear(x, mlp.down_proj.weight), Attention(rows, columns, weights)

    @property
    def _wide(self) -> torch.dtype:
        return torch.promote_types(self.dtype, torch.float32)

    def _norm(self, norm: torch.nn.Module, x: Tensor) -> Tensor:
        wide = x.to(self._wide)
        return norm.weight * (wide / (wide.square().mean(-1, keepdim=True) + norm.eps).sqrt()).to(x.dtype)

    def _rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotary embedding of x [heads, R, D], dimension d paired with d + D/2."""
        half = self.config.head_dim // 2
        frequency = self.config.rope_theta ** (-torch.arange(half, dtype=self._wide) / half)
        angle = positions[:, None] * frequency  # [R, D/2]
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        first, second = x[..., :half], x[..., half:]
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
