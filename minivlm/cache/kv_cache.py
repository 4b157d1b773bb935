"""The KV cache: its life in turns and steps.

A turn is a prefill and the decode steps of its answer. `prefill` plans the turn and returns the passes that the
decoder runs against; then, step by step, `next_kind` says what the next step is, `decode` gives its pass, and
`finish_step` counts it (`minivlm.generation.steps.decode_step` does all that in one call).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from minivlm.cache.counts import SequenceState, check_turn
from minivlm.cache.decode_pass import DecodePass
from minivlm.cache.policy import Policy
from minivlm.cache.prefill_pass import PrefillPass
from minivlm.cache.slots import bucket
from minivlm.cache.state import CacheState, StepKind
from minivlm.model.config import TextConfig


class KVCache(CacheState):
    """Keys and values of a batch of sequences in every layer, under one policy.

    `samples` are the sequences' numbers, by which random policies draw. `static`: decode steps have fixed shapes, for
    `torch.compile`; otherwise they slice what is live. `gather`: a static core step reads its entries by index and no
    others, which is fast on a GPU and slow on a CPU; there a step passes over everything that was kept and gives the
    rest no weight. None chooses by the device.
    """

    # The passes' classes; eval/attention puts others in their place, which watch.
    prefill_pass: type[PrefillPass] = PrefillPass
    decode_pass: type[DecodePass] = DecodePass

    def __init__(
        self,
        config: TextConfig,
        policy: Policy,
        samples: Sequence[int] = (0,),
        *,
        device: torch.device | str = "cpu",
        static: bool = False,
        gather: bool | None = None,
    ) -> None:
        super().__init__(config, policy, len(samples), device=device, static=static, gather=gather)
        self.reset(samples)

    def reset(self, samples: Sequence[int]) -> None:
        """Forget all entries. As many new sequences as before use the buffers again, where they fit."""
        self.sequences = [SequenceState(sample) for sample in samples]
        self.num_turns = 0
        self.step_kinds = []
        self.max_steps = 0

    def prefill(
        self, is_vision: Sequence[Tensor], max_new_tokens: int, rows_at_once: int | None = None
    ) -> list[PrefillPass]:
        """Begin a turn, with room for `max_new_tokens` >= 1: the passes over its new tokens, to be run in this order.

        is_vision holds one bool tensor [S] per sequence, on the CPU. An answer's last token is never stored, so in a
        later turn it comes first. A pass takes `rows_at_once` rows; None: all. A later turn takes all, because old
        entries share buffers.

        Raises `UserError` if the new tokens leave the model's context or the policy's counts are infeasible; the cache
        is then as it was.
        """
        stored = self.stored.tolist() if self.num_turns else [0] * len(self.sequences)
        lengths = [sequence.length + n for sequence, n in zip(self.sequences, stored, strict=True)]
        context = self.config.context_length
        for mask, length in zip(is_vision, lengths, strict=True):
            check_turn(self.policy, mask, length, context)

        # Plan for all rows first: a turn that is refused must not have changed anything.
        room = max(context - length - len(mask) for length, mask in zip(lengths, is_vision, strict=True))
        max_steps = max(0, min(max_new_tokens - 1, room))
        plans = [
            sequence.plan_turn(mask, n, self.budgets, self.policy.whole_cache, max_steps)
            for sequence, mask, n in zip(self.sequences, is_vision, stored, strict=True)
        ]
        for sequence, plan in zip(self.sequences, plans, strict=True):
            sequence.begin_turn(plan)
        self.max_steps = max_steps
        self.fill_tables()
        self.step_kinds = []
        self.num_turns += 1
        batch = len(plans)
        at_once = batch if self.num_turns > 1 or rows_at_once is None else rows_at_once
        return [
            self.prefill_pass(self, plans, range(first, min(first + at_once, batch)))
            for first in range(0, batch, at_once)
        ]

    def fill_tables(self) -> None:
        """Bring the step tables and counters on the device to the start of this turn's answer."""
        surplus = [(0, False, 0)] * (bucket(self.max_steps) - self.max_steps)
        for group, budget in enumerate(self.budgets):
            rows = [sequence.step_table(group, budget, self.max_steps) + surplus for sequence in self.sequences]
            table = torch.tensor(rows, dtype=torch.int64).view(len(rows), -1, 3).permute(2, 0, 1)  # [3, B, steps]
            if self.tables[group].shape != table.shape:
                self.tables[group] = torch.empty(table.shape, dtype=torch.int64, device=self.device)
            self.tables[group].copy_(table)
        self.answer_start.copy_(torch.tensor([sequence.length for sequence in self.sequences]))
        self.stored.zero_()
        self.active.fill_(True)

    @property
    def next_kind(self) -> StepKind:
        """The kind of the next decode step."""
        interval = self.policy.interval
        if interval <= 0 or not any(sequence.vision_positions for sequence in self.sequences):
            return "full"
        return "refresh" if (self.steps + 1) % interval == 0 else "core"

    def decode(self, kind: StepKind) -> DecodePass:
        """The pass of a step."""
        return self.decode_pass(self, kind)

    def finish_step(self, kind: StepKind) -> None:
        """Note that a step of this kind ran: what the host knows of it."""
        self.step_kinds.append(kind)

    def tensors(self) -> Iterator[Tensor]:
        """All tensors that a decode step reads or writes."""
        yield from (*self.tables, self.stored, self.answer_start, self.active)
        for buffers in self.layers:
            yield from buffers.tensors()

    @property
    def nbytes(self) -> int:
        """Bytes allocated: those of the layers (see `LayerBuffers.nbytes`) and of the step tables."""
        return sum(buffers.nbytes for buffers in self.layers) + sum(table.nbytes for table in self.tables)
