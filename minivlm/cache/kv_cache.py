"""The KV cache: its life in turns and steps.

A turn is a prefill and the decode steps of its answer. `prefill` plans the turn and returns the passes that the
decoder runs against; then, step by step, `next_kind` says what the next step is, `decode` gives its pass, and
`finish_step` counts it (`minivlm.generation.steps.decode_step` does all that in one call).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from minivlm.cache.counts import EntryCounts, SequenceState, TurnPlan, check_turn, plan_entries
from minivlm.cache.decode_pass import DecodePass
from minivlm.cache.policy import Policy
from minivlm.cache.prefill_pass import PrefillPass
from minivlm.cache.slots import bucket
from minivlm.cache.state import CacheState, StepKind
from minivlm.model.config import TextConfig
from minivlm.transfer import to_device


class KVCache(CacheState):
    """Keys and values of a batch of sequences in every layer, under one policy.

    `samples` are the sequences' numbers, by which random policies draw. `static`: decode steps have fixed shapes, for
    `torch.compile`; otherwise they slice what is live. `gather`: the way of a GPU. Buffers never shrink, so that few
    graphs are recorded, and a static core step reads its entries by index and no others. On a CPU that is slow; there a
    step passes over everything that was kept and gives the rest no weight. None chooses by the device.
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
        counts = [self._plan_layer(layer_idx, plans) for layer_idx in range(self.config.num_hidden_layers)]
        for sequence, plan in zip(self.sequences, plans, strict=True):
            sequence.begin_turn(plan)
        self.max_steps = max_steps
        self.begin_answer(counts)
        self.step_kinds = []
        self.num_turns += 1
        batch = len(plans)
        at_once = batch if self.num_turns > 1 or rows_at_once is None else rows_at_once
        return [
            self.prefill_pass(self, plans, counts, range(first, min(first + at_once, batch)))
            for first in range(0, batch, at_once)
        ]

    def _plan_layer(self, layer_idx: int, plans: Sequence[TurnPlan]) -> list[EntryCounts]:
        """What each row will hold in a layer after this turn's prefill."""
        past = self.layers[layer_idx].counts if self.num_turns else [EntryCounts()] * len(plans)
        group = self.budget_group[layer_idx]
        return [plan_entries(self.policy, layer_idx, group, *each) for each in zip(plans, past, strict=True)]

    def begin_answer(self, counts: Sequence[Sequence[EntryCounts]]) -> None:
        """Bring the numbers on the device to the start of this turn's answer, without waiting for it.

        counts are what each row will hold after prefill, by layer.
        """
        numbers = [[(row.fixed, row.system, row.core + row.system, row.tail) for row in layer] for layer in counts]
        self.counts.copy_(self._sent(numbers).permute(2, 0, 1)[..., None])  # [4, L, B, 1]
        if self.core_slots is not None:
            width = bucket(max(row.core + row.system for layer in counts for row in layer), self.bucket_size)
            if width > self.core_slots.shape[2]:
                self.core_slots = self.core_slots.new_zeros(*self.core_slots.shape[:2], width)
        room = bucket(self.max_steps)
        for group, budget in enumerate(self.budgets):
            rows = [sequence.step_table(group, budget, self.max_steps) for sequence in self.sequences]
            if not self.fits(self.tables[group].shape[2], room):
                self.tables[group] = self.counts.new_zeros(3, len(rows), room)
            if self.max_steps:
                self.tables[group][..., : self.max_steps].copy_(self._sent(rows).permute(2, 0, 1))  # [3, B, steps]
        self.answer_start.copy_(self._sent([sequence.length for sequence in self.sequences]))
        self.stored.zero_()
        self.active.fill_(True)

    def _sent(self, numbers: Sequence) -> Tensor:
        return to_device(torch.tensor(numbers, dtype=torch.int64), self.device)

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
        yield from (self.counts, self.next_place, *self.tables, self.stored, self.answer_start, self.active)
        if self.core_slots is not None:
            yield self.core_slots
        for buffers in self.layers:
            yield from buffers.tensors()

    @property
    def nbytes(self) -> int:
        """Bytes allocated: those of the layers (see `LayerBuffers.nbytes`), and 8 for each number beside them."""
        return sum(tensor.nbytes for tensor in self.tensors())
