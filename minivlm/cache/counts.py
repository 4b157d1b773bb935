"""What the host knows of each sequence: counts and positions, as Python integers.

Everything here follows from the prompt, the policy's counts and the room for the answer, before any layer runs. So
buffers can be sized at prefill, and a decode step needs no word from the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from minivlm.cache.policy import Policy, Prompt, TokenBudget
from minivlm.errors import UserError


@dataclass(frozen=True)
class EntryCounts:
    """How many entries of each class one sequence holds in one layer."""

    vision: int = 0
    core: int = 0  # of the vision entries
    system: int = 0
    tail: int = 0  # after prefill
    tail_capacity: int = 0  # tail entries that the answer can ever need at once

    @property
    def fixed(self) -> int:
        """Entries that no decode step evicts."""
        return self.vision + self.system


@dataclass(frozen=True)
class TailPlan:
    """What becomes of one sequence's tail during a turn, in all layers with the same token budget."""

    past: int  # entries from earlier turns
    length: int  # entries that stay after this turn's prefill
    capacity: int  # entries that the answer can ever need at once
    recent_from: int  # at prefill, entries from this position on are protected


@dataclass(frozen=True)
class TurnPlan:
    """One sequence's new tokens, planned before any layer runs."""

    sample: int
    start: int  # position of the first new token
    is_vision: Tensor  # bool [S], on the CPU
    system: int  # tokens of the system prefix among them; 0 in a later turn
    tails: Sequence[TailPlan]  # one for each distinct budget

    @property
    def prompt(self) -> Prompt:
        return Prompt(len(self.is_vision), int(self.is_vision.sum()))


@dataclass
class SequenceState:
    """What the host knows of one sequence between turns and steps."""

    sample: int  # its number, which seeds random policies
    length: int = 0  # tokens that have a position, without this turn's answer
    vision_positions: list[int] = field(default_factory=list)
    evictable_positions: list[int] = field(default_factory=list)  # of the tokens the budget is over, in order
    # For each distinct budget, the tail's live entries once 0, 1, 2, ... tokens of the answer are stored.
    tail_lengths: list[list[int]] = field(default_factory=list)

    def begin_turn(
        self, is_vision: Tensor, stored: int, budgets: Sequence[TokenBudget | None], whole_cache: bool, max_steps: int
    ) -> TurnPlan:
        """Take in the stored tokens of the last answer and a turn's new tokens, and plan the turn.

        `max_steps` decode steps can follow.
        """
        past_tails = [lengths[stored] for lengths in self.tail_lengths] or [0] * len(budgets)
        first_turn = self.length == 0
        self.evictable_positions += range(self.length, self.length + stored)
        start = self.length + stored

        # The system prefix is what stands before the first image; without any image it is the first token.
        vision = is_vision.nonzero()[:, 0].tolist()
        system = 0
        if first_turn and not whole_cache:
            system = vision[0] if vision else min(1, len(is_vision))
        others = range(len(is_vision)) if whole_cache else (~is_vision).nonzero()[:, 0].tolist()
        evictable = [start + i for i in others[system:]]

        self.evictable_positions += evictable
        self.vision_positions += [start + i for i in vision]
        self.length = start + len(is_vision)
        tails = []
        self.tail_lengths = []
        for past, budget in zip(past_tails, budgets, strict=True):
            lengths = self._tail_lengths(past + len(evictable), budget, max_steps)
            self.tail_lengths.append(lengths)
            protected = limits(budget, len(self.evictable_positions), 0)[1]
            tails.append(
                TailPlan(
                    past=past,
                    length=lengths[0],
                    # The token of a step is there before the step's victim goes.
                    capacity=max([lengths[0]] + [before + 1 for before in lengths[:-1]]),
                    recent_from=self._position(len(self.evictable_positions) - protected),
                )
            )
        return TurnPlan(self.sample, start, is_vision, system, tails)

    def _tail_lengths(self, entries: int, budget: TokenBudget | None, max_steps: int) -> list[int]:
        prompt = len(self.evictable_positions)
        lengths = [min(entries, limits(budget, prompt, 0)[0])]
        for answer in range(1, max_steps + 1):
            lengths.append(min(lengths[-1] + 1, limits(budget, prompt, answer)[0]))
        return lengths

    def step_table(self, group: int, budget: TokenBudget | None, max_steps: int) -> list[tuple[int, bool, int]]:
        """For each decode step: tail entries to attend to, whether one is evicted, first position that is protected."""
        lengths = self.tail_lengths[group]
        prompt = len(self.evictable_positions)
        table = []
        for step in range(max_steps):
            protected = limits(budget, prompt, step + 1)[1]
            evicts = lengths[step + 1] <= lengths[step]
            table.append((lengths[step] + 1, evicts, self._position(prompt + step + 1 - protected)))
        return table

    def _position(self, order: int) -> int:
        """Original position of the order-th evictable token; the tokens of the answer follow one another."""
        order = max(order, 0)
        if order < len(self.evictable_positions):
            return self.evictable_positions[order]
        return self.length + order - len(self.evictable_positions)


def limits(budget: TokenBudget | None, prompt: int, answer: int) -> tuple[int, int]:
    """A budget's limits; without a budget everything stays, and nothing needs protection."""
    return (prompt + answer, 0) if budget is None else budget.limits(prompt, answer)


def plan_entries(policy: Policy, layer_idx: int, group: int, turn: TurnPlan, past: EntryCounts) -> EntryCounts:
    """What one sequence will hold in a layer after this turn's prefill, beside or among what is there from the past."""
    tail = turn.tails[group]
    if policy.whole_cache:
        return EntryCounts(tail=tail.length, tail_capacity=tail.capacity)
    vision = core = policy.vision_tokens(turn.prompt, layer_idx)
    selection = policy.vision_at(layer_idx)
    if selection is not None:
        counts = selection.counts(turn.prompt)
        vision = min(counts.keep, vision)
        core = min(counts.core, vision)
    return EntryCounts(past.vision + vision, past.core + core, past.system + turn.system, tail.length, tail.capacity)


def check_turn(policy: Policy, is_vision: Tensor, length: int, num_layers: int, context_length: int) -> None:
    """Raise `UserError` if a turn of these tokens, after `length` earlier ones, cannot be prefilled."""
    if len(is_vision) == 0 or is_vision[-1]:
        raise UserError("a prompt has to end in text: policies score with the attention of its last token")
    if length + len(is_vision) > context_length:
        raise UserError(f"the sequence has {length + len(is_vision)} tokens, the model's context only {context_length}")
    policy.check(Prompt(len(is_vision), int(is_vision.sum())), num_layers)
