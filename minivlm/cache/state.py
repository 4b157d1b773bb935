"""What a KV cache consists of; `KVCache` adds the verbs, the passes of prefill and decode read and write it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from minivlm.cache.buffers import LayerBuffers
from minivlm.cache.counts import SequenceState
from minivlm.cache.policy import Policy, TokenBudget
from minivlm.cache.slots import BUCKET, LARGE_BUCKET
from minivlm.model.config import TextConfig

# What takes part in a decode step; see the words in minivlm/cache/__init__.py.
StepKind = Literal["core", "refresh", "full"]


class CacheState:
    """The data of a cache: what is fixed, what the host knows, and what lies on the device.

    Raises `UserError` for a policy that does not have a part for each layer.
    """

    def __init__(
        self,
        config: TextConfig,
        policy: Policy,
        batch: int,
        *,
        device: torch.device | str = "cpu",
        static: bool = False,
        gather: bool | None = None,
    ) -> None:
        # Fixed for the cache's life.
        self.config = config
        self.policy = policy
        self.device = torch.device(device)
        self.static = static
        self.gather = static and (self.device.type == "cuda" if gather is None else gather)
        # The attention of a static step on CUDA; elsewhere it is `attention.decode_static`, and needs no Triton.
        self.decode_split: Callable[..., tuple[Tensor, Tensor | None]] | None = None
        if static and self.device.type == "cuda":
            from minivlm.cache.decode_split import decode_split

            self.decode_split = decode_split
        policy.check_layers(config.num_hidden_layers)
        by_layer = [policy.budget_at(layer_idx) for layer_idx in range(config.num_hidden_layers)]
        # Layers with equal token budgets share their counts.
        self.budgets: list[TokenBudget | None] = list(dict.fromkeys(by_layer))
        self.budget_group = [self.budgets.index(budget) for budget in by_layer]  # of each layer

        # On the host.
        self.sequences: list[SequenceState] = []
        self.num_turns = 0
        self.step_kinds: list[StepKind] = []  # of this turn's decode steps
        self.max_steps = 0  # decode steps for which there is room
        self.runs: list[tuple[int, int]] = []  # of layers whose tails start at the same slot: first, end

        # On the device.
        self.layers: list[LayerBuffers] = []
        # Entries of each layer and row after prefill: fixed, system, core with system, and tail ones, [4, L, B, 1].
        self.counts = torch.zeros(4, config.num_hidden_layers, batch, 1, dtype=torch.int64, device=self.device)
        # Where in its tail each head's next token goes, counted from the tail's start.
        self.next_place = self.counts.new_zeros(config.num_hidden_layers, batch, config.num_key_value_heads)
        # The slots left of the tail that a core step reads [L, B, n], where it reads by index.
        self.core_slots: Tensor | None = None
        if self.gather and policy.interval > 1:
            self.core_slots = self.counts.new_zeros(config.num_hidden_layers, batch, 0)
        # For each distinct budget [3, B, steps]; see `SequenceState.step_table`.
        self.tables = [self.counts.new_zeros(3, batch, 0) for _ in self.budgets]
        self.stored = self.counts.new_zeros(batch)  # tokens of this turn's answer
        self.answer_start = torch.zeros_like(self.stored)  # position of the answer's first token
        self.active = torch.ones(batch, dtype=torch.bool, device=self.device)  # sequences that have not finished

    @property
    def bucket_size(self) -> int:
        """Slots to which buffers are rounded up."""
        return LARGE_BUCKET if self.gather else BUCKET

    def fits(self, size: int, needed: int) -> bool:
        """Whether a buffer of this size is used again where another size is needed."""
        return size >= needed if self.gather else size == needed

    @property
    def steps(self) -> int:
        """Decode steps of this turn."""
        return len(self.step_kinds)

    @property
    def position(self) -> Tensor:
        """Original position [B, 1] of the token that the next step feeds."""
        return (self.answer_start + self.stored)[:, None]

    def tail_length(self, layer_idx: int, row: int, stored: int) -> int:
        """Live tail entries of a row in a layer once `stored` tokens of the answer are stored."""
        return self.sequences[row].tail_lengths[self.budget_group[layer_idx]][stored]
