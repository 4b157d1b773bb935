"""A-VL stated a second time, slowly and plainly, as the oracle that the real cache is tested against.

It handles one sequence, with explicit softmax matrices and one Python list of live positions for each layer and
key/value head. Index p of a layer's key and value tables belongs to original position p. An evicted entry leaves the
list, and its key and value become NaN, so that anything that still read them would show. Paper: A-VL, AAAI-25, arXiv
2409.14846.

    ref = Reference(model, Settings(vision=True, vision_interval=3, text="h2o"))
    ref.prefill(embeds, is_vision)        # [S, C], [S] -> logits [V]
    tokens = ref.generate(20)             # greedy; or ref.step(token), one by one
    ref.turn(ref.embed([tokens[-1], ...]), is_vision)    # a later turn starts with the token that was never fed

Afterwards `fate`, `vision_kept()`, `cores` and `margins` tell what was decided, and how narrowly. `p` is a position
everywhere; a "column" is an entry that queries attend to.

Where the description of the method leaves room, it is read as follows:

- The images of one turn are selected together: N counts all vision tokens that are new in the turn.
- The core of a later turn has as many entries as the sum over all turns of min(Nc, Nk, what the layer kept).
- The score window is the last min(W, X) queries still in the layer, whatever tokens they are; X is the number of the
  turn's own text tokens.
- Only the first turn has system tokens. In a later turn everything that is not vision is text, even if no image came
  before.
- A later turn is a prefill for `history` too (the quantile leaves the token itself out), and for `direct` (only the
  last query counts). Whole-cache H2O goes on counting all positions so far.
- The `recent` text columns are those of the highest positions, whether they come before or after an image.
- A turn may not end in a vision token: the filter could drop the query whose logits are wanted.
- Streaming keeps the first min(4, B) and the last B - min(4, B) of a head's columns, where B = streaming(tokens seen).
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
SINKS = 4  # first tokens that streaming always keeps
TINY = 1e-25  # a float32 softmax cannot tell scores below this from zero: between two of them every choice is a tie


@dataclass(frozen=True)
class Settings:
    """The numbers of the method, with the names and defaults of its description; a rate is the share removed."""

    vision: bool = False
    vision_rate: float = 0.5
    vision_compute_rate: float = 0.6
    vision_interval: int = -1
    score_window: int = 1
    text: str | None = None  # "h2o", "direct" or "history"
    text_rate: float = 0.5
    text_init_cache: int = 20
    text_hh_rate: float = 0.7
    prefill_filter: bool = False  # on its own, at filter_layer 2, this is FastV
    filter_layer: int = 3
    filter_rate: float = 0.5
    all_h2o: bool = False
    all_h2o_keep: float = 0.5  # share of the columns that stay; 0.5 in the authors' code
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
        self.keys = torch.full((kv_heads, capacity, head_dim), math.nan, dtype=dtype)  # by position
        self.values = self.keys.clone()
        self.live: list[list[int]] = [[] for _ in range(kv_heads)]  # positions, ascending
        self.score: list[dict[int, float]] = [{} for _ in range(kv_heads)]  # of text (or all) columns
        # The same sums with every term taken as positive: the size against which a margin is measured.
        self.scale: list[dict[int, float]] = [{} for _ in range(kv_heads)]
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

    queries: list[int]  # positions of the queries
    columns: list[list[int]]  # for each key/value head, positions of the keys
    weights: list[Tensor]  # for each key/value head [G, queries, columns], with the G query heads of its group

    def grouped(self, head: int) -> list[list[float]]:
        """[queries][columns], summed over the query heads of a group."""
        return self.weights[head].double().sum(0).tolist()

    def mean(self, positions: Sequence[int], last: int = 1) -> dict[int, float]:
        """The mean weight of `positions` over all query heads and the `last` queries."""
        total = dict.fromkeys(positions, 0.0)
        for columns, weights in zip(self.columns, self.weights, strict=True):
            means = weights[:, -last:].double().mean(1).sum(0).tolist()
            for p, weight in zip(columns, means, strict=True):
                if p in total:
                    total[p] += weight
        heads = sum(len(weights) for weights in self.weights)
        return {p: weight / heads for p, weight in total.items()}


def best(score: dict[int, float], count: int, scale: dict[int, float] | None = None) -> tuple[list[int], float]:
    """The `count` best positions, best first, and their relative margin over the first loser (inf: no decision)."""
    order = sorted(score, key=lambda p: (-score[p], p))
    winners, losers = order[:count], order[count:]
    if not winners or not losers:
        return winners, math.inf
    last_winner, first_loser = winners[-1], losers[0]
    size = max(max(abs(score[p]), scale[p] if scale else 0.0) for p in (last_winner, first_loser))
    return winners, (score[last_winner] - score[first_loser]) / max(size, TINY)


def quantile(values: Sequence[float], q: float) -> float:
    """The q-quantile with linear interpolation, the default of numpy and torch."""
    ordered = sorted(values)
    place = q * (len(ordered) - 1)
    low = min(int(place), len(ordered) - 1)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


class Reference:
    """The method on one sequence, computed in `dtype` with the weights of `model`."""

    def __init__(self, model: Llava, settings: Settings, dtype: torch.dtype = torch.float64) -> None:
        self.model = copy.deepcopy(model).to(dtype).requires_grad_(False)
        self.settings = settings
        self.dtype = dtype
        self.config = config = model.config.text
        self.group = config.num_attention_heads // config.num_key_value_heads
        self.layers = [
            Layer(config.num_key_value_heads, config.context_length, config.head_dim, dtype)
            for _ in range(config.num_hidden_layers)
        ]
        self.token_kinds: list[str] = []  # SYSTEM, VISION or TEXT, by position
        self.call = -1  # number of the current forward pass; 0 is the first prefill
        self.turn_step = 0  # decode steps since this turn's prefill
        self.logits: list[Tensor] = []  # by call
        # Of each choice of the core: (call, [layer][positions, best first]).
        self.cores: list[tuple[int, list[list[int]]]] = []
        # By call: for each layer "vision", "core", "filter" and "text"; and one "logit".
        self.margins: list[dict[str, list[float]]] = []

    # -- what a caller does ---------------------------------------------------------------------

    def embed(self, token_ids: Sequence[int]) -> Tensor:
        return self.model.language_model.embed_tokens(torch.tensor(token_ids, dtype=torch.long))  # [S, C]

    def prefill(self, embeds: Tensor, is_vision: Sequence[bool]) -> Tensor:
        """The first turn: embeddings [S, C] -> logits [V] after its last token."""
        assert not self.token_kinds, "there is only one prefill, and it comes first"
        return self.turn(embeds, is_vision)

    @torch.no_grad()
    def turn(self, embeds: Tensor, is_vision: Sequence[bool]) -> Tensor:
        """One turn: its new embeddings [S, C] -> logits [V].

        In a later turn they begin with the last token of the previous answer.
        """
        flags = [bool(v) for v in is_vision]
        if flags[-1]:
            raise ValueError("a turn may not end in a vision token")
        kinds = self._classify(flags)
        queries = self._begin(kinds)
        self.turn_step = 0
        settings, n = self.settings, flags.count(True)
        window = max(1, min(settings.score_window, kinds.count(TEXT)))
        keep = int((1 - settings.vision_rate) * n)
        core = int((1 - settings.vision_compute_rate) * n)
        survive = int((1 - settings.filter_rate) * n)

        hidden = embeds.to(self.dtype)
        for layer_idx, layer in enumerate(self.layers):
            hidden, attention = self._run(layer_idx, hidden, queries, [list(live) for live in layer.live])
            self._prune_columns(layer_idx, attention)
            new = [p for p in queries if self.token_kinds[p] == VISION]
            if settings.vision:
                kept, self.margins[-1]["vision"][layer_idx] = best(attention.mean(new, window), keep)
                self._evict_everywhere(layer, [p for p in new if p not in kept])
                layer.core_size += min(core, len(kept))
                self._choose_core(layer_idx, attention, window)
            if settings.prefill_filter and layer_idx == settings.filter_layer - 1:
                winners, self.margins[-1]["filter"][layer_idx] = best(attention.mean(new, window), survive)
                staying = [i for i, p in enumerate(queries) if self.token_kinds[p] != VISION or p in winners]
                hidden, queries = hidden[staying], [queries[i] for i in staying]
        return self._finish(hidden, chose_core=settings.vision and VISION in self.token_kinds)

    @torch.no_grad()
    def step(self, token: int) -> Tensor:
        """Feed one token -> logits [V]."""
        queries = self._begin([TEXT])
        self.turn_step += 1
        interval = self.settings.vision_interval
        has_core = self.settings.vision and interval > 0 and VISION in self.token_kinds
        refresh = has_core and self.turn_step % interval == 0

        hidden = self.embed([token])
        for layer_idx, layer in enumerate(self.layers):
            columns = [list(live) for live in layer.live]
            if has_core and not refresh:
                columns = [[p for p in live if self.token_kinds[p] != VISION or p in layer.core] for live in columns]
            hidden, attention = self._run(layer_idx, hidden, queries, columns)
            self._prune_columns(layer_idx, attention)
            if refresh:
                self._choose_core(layer_idx, attention, window=1)
        return self._finish(hidden, chose_core=refresh)

    def generate(self, count: int) -> list[int]:
        """The next `count` greedy tokens; the last of them is not fed."""
        tokens = [int(self.logits[-1].argmax())]
        while len(tokens) < count:
            tokens.append(int(self.step(tokens[-1]).argmax()))
        return tokens

    # -- what a test reads ----------------------------------------------------------------------

    @property
    def fate(self) -> list[list[list[int]]]:
        """[layer][kv_head][position]: the call that evicted the entry; -1: still held, -2: never in the layer."""
        return [layer.fate for layer in self.layers]

    def vision_ordinal(self, position: int) -> int:
        """The index of a vision token among all vision tokens of the sequence."""
        return self.token_kinds[:position].count(VISION)

    def vision_kept(self) -> list[list[int]]:
        """[layer]: positions of the vision entries that head 0 holds now.

        All heads of a layer agree, unless a budget is over the whole cache.
        """
        return [[p for p in layer.live[0] if self.token_kinds[p] == VISION] for layer in self.layers]

    def live_counts(self) -> list[dict[str, int]]:
        """[layer]: entries of each kind in one head; raises if the heads of a layer disagree."""
        counts = []
        for layer in self.layers:
            per_head = [
                {kind: sum(self.token_kinds[p] == kind for p in live) for kind in (SYSTEM, VISION, TEXT)}
                for live in layer.live
            ]
            assert all(count == per_head[0] for count in per_head), per_head
            counts.append(per_head[0])
        return counts

    def first_tie(self, margin: float, logit: float = 0.0) -> int:
        """The first call that took a decision by less than `margin`, or the number of calls so far if there is none.

        A call whose two best logits differ by less than `logit` counts as well. What such a call read can still be
        compared, and so can its logits; what it evicted, and everything after it, cannot.
        """
        for call, margins in enumerate(self.margins):
            if any(min(values) < (logit if name == "logit" else margin) for name, values in margins.items()):
                return call
        return len(self.margins)

    # -- the rules ------------------------------------------------------------------------------

    def _classify(self, flags: list[bool]) -> list[str]:
        """Which of a turn's new tokens are SYSTEM, VISION and TEXT, given which are vision tokens."""
        system = 0
        if not self.token_kinds:  # this is the first turn
            system = flags.index(True) if True in flags else 1
        others = [SYSTEM if i < system else TEXT for i in range(len(flags))]
        return [VISION if flag else other for flag, other in zip(flags, others, strict=True)]

    def _begin(self, kinds: list[str]) -> list[int]:
        """Count the call, take in the kinds of its new tokens, and return their positions."""
        positions = list(range(len(self.token_kinds), len(self.token_kinds) + len(kinds)))
        assert positions[-1] < self.config.context_length, "the sequence is longer than the model's context"
        self.token_kinds += kinds
        self.call += 1
        self.margins.append({name: [math.inf] * len(self.layers) for name in ("vision", "core", "filter", "text")})
        for layer in self.layers:
            for fate in layer.fate:
                fate += [-2] * len(kinds)
        return positions

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

    def _choose_core(self, layer_idx: int, attention: Attention, window: int) -> None:
        layer = self.layers[layer_idx]
        kept = [p for p in layer.live[0] if self.token_kinds[p] == VISION]
        layer.core, self.margins[-1]["core"][layer_idx] = best(attention.mean(kept, window), layer.core_size)

    def _prune_columns(self, layer_idx: int, attention: Attention) -> None:
        """Whole-cache H2O, streaming or a text budget: score, then evict, in each head by itself."""
        settings, layer, seen = self.settings, self.layers[layer_idx], len(self.token_kinds)
        text_seen = self.token_kinds.count(TEXT)
        budget = max(round((1 - settings.text_rate) * text_seen), settings.text_init_cache)
        narrowest = math.inf
        for head, live in enumerate(layer.live):
            if settings.streaming:
                room = settings.streaming(seen)
                sinks = min(SINKS, room)
                middle = live[sinks : len(live) - (room - sinks)] if len(live) > room else []
                layer.evict(head, middle, self.call)
                continue
            if settings.all_h2o:
                columns = list(live)
                self._accumulate(layer, head, attention, (SYSTEM, VISION, TEXT))
                heavy = int(seen * settings.all_h2o_keep * 0.25)
                recent = int(seen * settings.all_h2o_keep * 0.75)
            elif settings.text:
                columns = [p for p in live if self.token_kinds[p] == TEXT]
                if settings.text == "h2o":
                    self._accumulate(layer, head, attention, (TEXT,))
                    heavy = int(budget * settings.text_hh_rate)
                elif settings.text == "history":
                    self._accumulate_history(layer, head, attention)
                    heavy = budget - budget // 2
                else:
                    last_query = attention.grouped(head)[-1]
                    layer.score[head] = dict(zip(attention.columns[head], last_query, strict=True))
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
        self.margins[-1]["text"][layer_idx] = narrowest

    def _accumulate(self, layer: Layer, head: int, attention: Attention, kinds: Sequence[str]) -> None:
        """H2O: a column's score is the sum of the weights that all queries of the given kinds ever gave it."""
        grouped = attention.grouped(head)
        counting = [grouped[i] for i, p in enumerate(attention.queries) if self.token_kinds[p] in kinds]
        for p, *weights in zip(attention.columns[head], *counting, strict=True):
            if self.token_kinds[p] in kinds:
                layer.score[head][p] = layer.score[head].get(p, 0.0) + math.fsum(weights)

    def _accumulate_history(self, layer: Layer, head: int, attention: Attention) -> None:
        """A text column's score: the weight of its own query, then what later queries give it above their quantile."""
        score, scale = layer.score[head], layer.scale[head]
        for own, weights in zip(attention.queries, attention.grouped(head), strict=True):
            if self.token_kinds[own] != TEXT:
                continue
            by_column = zip(attention.columns[head], weights, strict=True)
            earlier = {p: weight for p, weight in by_column if self.token_kinds[p] == TEXT and p <= own}
            score[own] = scale[own] = earlier.pop(own)
            if earlier:
                values = list(earlier.values())
                if self.turn_step > 0:  # a decode step
                    values.append(score[own])
                level = quantile(values, self.settings.text_rate)
                for p, weight in earlier.items():
                    score[p] += weight - level
                    scale[p] += weight + level

    # -- the decoder ----------------------------------------------------------------------------

    def _run(
        self, layer_idx: int, hidden: Tensor, queries: list[int], earlier: list[list[int]]
    ) -> tuple[Tensor, Attention]:
        """One decoder layer on hidden [S, C].

        `earlier` are, for each key/value head, the positions of the old entries that take part.
        """
        block = self.model.language_model.layers[layer_idx]
        layer = self.layers[layer_idx]
        head_dim = self.config.head_dim
        x = self._norm(block.input_layernorm, hidden)
        heads = self.config.num_attention_heads, self.config.num_key_value_heads, self.config.num_key_value_heads
        q, k, v = (
            F.linear(x, weight).view(len(queries), -1, head_dim).transpose(0, 1)  # [H or H_kv, S, D]
            for weight in block.self_attn.qkv_proj.weight.split([count * head_dim for count in heads])
        )
        positions = torch.tensor(queries)
        q, k = self._rotate(q, positions), self._rotate(k, positions)
        layer.keys[:, positions] = k
        layer.values[:, positions] = v
        columns = [old + queries for old in earlier]
        out, weights = [], []
        for head, column_positions in enumerate(columns):
            layer.live[head] += queries
            for p in queries:
                layer.fate[head][p] = -1
            index = torch.tensor(column_positions)
            keys, values = layer.keys[head, index], layer.values[head, index]  # [n, D]
            scores = q[head * self.group : (head + 1) * self.group] @ keys.T / math.sqrt(head_dim)  # [G, S, n]
            scores = scores.to(self._wide).masked_fill(index > positions[:, None], -math.inf)
            weights.append(scores.softmax(-1))
            out.append(weights[-1].to(self.dtype) @ values)  # [G, S, D]
        merged = torch.cat(out).transpose(0, 1).reshape(len(queries), -1)  # [S, H * D]
        hidden = hidden + F.linear(merged, block.self_attn.o_proj.weight)
        x = self._norm(block.post_attention_layernorm, hidden)
        gate, up = block.mlp.gate_up_proj.weight.chunk(2)
        x = F.silu(F.linear(x, gate)) * F.linear(x, up)
        return hidden + F.linear(x, block.mlp.down_proj.weight), Attention(queries, columns, weights)

    @property
    def _wide(self) -> torch.dtype:
        return torch.promote_types(self.dtype, torch.float32)

    def _norm(self, norm: torch.nn.Module, x: Tensor) -> Tensor:
        wide = x.to(self._wide)
        return norm.weight * (wide / (wide.square().mean(-1, keepdim=True) + norm.eps).sqrt()).to(x.dtype)

    def _rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotary embedding of x [heads, S, D]; dimension d is paired with d + D/2."""
        half = self.config.head_dim // 2
        frequency = self.config.rope_theta ** (-torch.arange(half, dtype=self._wide) / half)
        angle = positions[:, None] * frequency  # [S, D/2]
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        first, second = x[..., :half], x[..., half:]
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
