"""Watching a cache from outside: which entries were evicted when, and which were the core.

An observer is shown the cache after the prefill and after every step; the cache knows nothing of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from minivlm.cache.kv_cache import KVCache
from minivlm.cache.prefill_pass import Prefill

HELD, NEVER = -1, -2


class Observer(Protocol):
    def prefilled(self, cache: KVCache, run: Prefill) -> None:
        """After the last layer of a turn's prefill."""

    def stepped(self, cache: KVCache, kind: str) -> None:
        """After a decode step and, where it was a refresh, the new choice of the cores."""


@dataclass
class Recorder:
    """The history of one sequence (row 0) over one turn.

    `fate` [L, H_kv, positions] int16: the step at whose end an entry was evicted (0: prefill), -1 while it is held, -2 for
    one that never entered the layer.  `cores`: (step, one [C] tensor of positions per layer, best first) at each choice.
    """

    fate: Tensor | None = None
    cores: list[tuple[int, list[Tensor]]] = field(default_factory=list)
    kept: list[Tensor] = field(default_factory=list)  # per layer: positions of the vision entries held after prefill

    def prefilled(self, cache: KVCache, run: Prefill) -> None:
        layers, kv_heads = len(cache.layers), cache.config.num_key_value_heads
        self.fate = torch.full((layers, kv_heads, cache.tracks[0].seen), 0, dtype=torch.int16)
        chosen, survivors = cache.policy.filter, run.rows[0].index.cpu()
        for i in range(layers):
            if chosen is not None and i >= chosen.layer:
                never = torch.ones(self.fate.shape[2], dtype=torch.bool)
                never[survivors] = False
                self.fate[i, :, never] = NEVER
            self._mark_held(cache, i)
        vision = torch.tensor(cache.tracks[0].vision)
        if cache.policy.budget is None or cache.policy.budget.over == "text":
            self.kept = [vision[self.fate[i, 0, vision] == HELD] for i in range(layers)] if len(vision) else []
        if cache.policy.vision is not None and len(vision):
            self._record_cores(cache)

    def stepped(self, cache: KVCache, kind: str) -> None:
        new = torch.full((*self.fate.shape[:2], 1), HELD, dtype=torch.int16)
        self.fate = torch.cat((self.fate, new), dim=2)
        for i in range(len(cache.layers)):
            self.fate[i][self.fate[i] == HELD] = cache.steps
            self._mark_held(cache, i)
        if kind == "refresh":
            self._record_cores(cache)

    def _mark_held(self, cache: KVCache, layer: int) -> None:
        self.fate[layer].scatter_(1, cache.live_positions(layer, 0).cpu().long(), HELD)

    def _record_cores(self, cache: KVCache) -> None:
        self.cores.append((cache.steps, [cache.core_positions(i, 0) for i in range(len(cache.layers))]))

    def ordinals(self, cache: KVCache, positions: list[Tensor]) -> Tensor:
        """Positions of vision tokens [C_l] of each layer -> their indices among all vision tokens, [L, C] padded with -1."""
        vision = torch.tensor(cache.tracks[0].vision)
        return pad_sequence(
            [torch.searchsorted(vision, p.long()) for p in positions], batch_first=True, padding_value=-1
        )
