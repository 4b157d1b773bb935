"""Watching a cache from outside: which entries were evicted when, and which were the core.

An observer is shown the cache after the prefill and after every step. The cache knows nothing of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from minivlm.cache.accounting import core_positions, live_positions
from minivlm.cache.kv_cache import KVCache
from minivlm.cache.prefill_pass import PrefillPass

HELD, NEVER = -1, -2  # fates of an entry that is not evicted, and of one that never entered the layer


class Observer(Protocol):
    """What is told of a cache's life."""

    def prefilled(self, cache: KVCache, prefill: PrefillPass) -> None:
        """After the last layer of a turn's prefill; `prefill` is the pass of the first rows."""

    def stepped(self, cache: KVCache) -> None:
        """After a decode step, which is the last of `cache.step_kinds`, and its choice of cores."""


@dataclass
class Recorder:
    """The history of one sequence (row 0) over one turn."""

    # [L, H_kv, positions] int16: the step at whose end an entry was evicted (0: prefill), or HELD, or NEVER.
    fate: Tensor = field(default_factory=lambda: torch.zeros(0, 0, 0, dtype=torch.int16))
    # At each choice: the step, and per layer the positions [C] of the core, best first.
    cores: list[tuple[int, list[Tensor]]] = field(default_factory=list)
    kept: list[Tensor] = field(default_factory=list)  # per layer: positions of the image entries held after prefill
    vision_positions: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))  # of all image tokens
    interval: int = 0  # decode steps from one choice of the core to the next; up to 1 every entry takes part in each

    def prefilled(self, cache: KVCache, prefill: PrefillPass) -> None:
        """Note what each layer holds after prefill, and its first core."""
        layers, kv_heads, positions = len(cache.layers), cache.config.num_key_value_heads, cache.sequences[0].length
        self.fate = torch.zeros(layers, kv_heads, positions, dtype=torch.int16)
        start = positions - len(prefill.plans[0].is_vision)
        for layer_idx in range(layers):
            never = torch.ones(positions, dtype=torch.bool)
            never[:start] = False
            never[start + prefill.computed[layer_idx][0].cpu()] = False
            self.fate[layer_idx, :, never] = NEVER
            self._mark_held(cache, layer_idx)
        self.interval = cache.policy.interval
        self.vision_positions = vision = torch.tensor(cache.sequences[0].vision_positions, dtype=torch.int64)
        if not cache.policy.whole_cache and len(vision):
            self.kept = [vision[self.fate[layer_idx, 0, vision] == HELD] for layer_idx in range(layers)]
        if cache.policy.vision is not None and len(vision):
            self._record_cores(cache)

    def stepped(self, cache: KVCache) -> None:
        """Note what the step evicted, and the core if it was chosen anew."""
        new = torch.full((*self.fate.shape[:2], 1), HELD, dtype=torch.int16)
        self.fate = torch.cat((self.fate, new), dim=2)
        for layer_idx in range(len(cache.layers)):
            self.fate[layer_idx][self.fate[layer_idx] == HELD] = cache.steps
            self._mark_held(cache, layer_idx)
        if cache.step_kinds[-1] == "refresh":
            self._record_cores(cache)

    def _mark_held(self, cache: KVCache, layer_idx: int) -> None:
        self.fate[layer_idx].scatter_(1, live_positions(cache, layer_idx, 0).cpu().long(), HELD)

    def _record_cores(self, cache: KVCache) -> None:
        cores = [core_positions(cache, layer_idx, 0) for layer_idx in range(len(cache.layers))]
        self.cores.append((cache.steps, cores))

    def ordinals(self, positions: list[Tensor]) -> Tensor:
        """Positions [C] of image tokens per layer -> their numbers among the image tokens, [L, C] padded with -1."""
        indices = [torch.searchsorted(self.vision_positions, of_layer.long()) for of_layer in positions]
        return pad_sequence(indices, batch_first=True, padding_value=-1)
