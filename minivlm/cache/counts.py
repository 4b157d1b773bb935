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
    """How many entries of each class one row holds in one layer."""

    vision: int = 0
    core: int = 0  # of the vision entries
    system: int = 0
    tail: int = 0  # after prefill; of old entries, at the start of a later turn
    tail_capacity: int = 0  # tail entries that the answer can ever need at once

    @property
    def fixed(self) -> int:
        """Entries that no decode step evicts."""
        return self.vision + self.system


@dataclass(frozen=True)
class TailPlan:
    """What becomes of one row's tail during a turn, in all layers with the same token budget."""

    past: int  # entries from earlier turns
    lengths: list[int]  # entries once 0, 1, 2, ... tokens of the answer are stored
    recent_from: int  # at prefill, entries from this position on are protected

    @property
    def capacity(self) -> int:
        """Entries that the answer can ever need at once: a step's token is there before the step's victim goes."""
        return max([self.lengths[0], *(length + 1 for length in self.lengths[:-1])])


@dataclass(frozen=True)
class TurnPlan:
    """One row's new tokens, planned before any layer runs."""

    sample: int
    first_position: int  # of the new tokens
    is_vision: Tensor  # bool [S], on the CPU
    prompt: Prompt
    system: int  # tokens of the system prefix among them; 0 in a later turn
    evictable_positions: list[int]  # of all tokens so far that the budget is over, in order
    tails: list[TailPlan]  # one for each distinct budget


@dataclass
class SequenceState:
    """What the host knows of one row between turns and steps."""

    sample: int  # its number, which seeds random policies
    length: int = 0  # tokens that have a position, without this turn's answer
    vision_positions: list[int] = field(default_factory=list)
    evictable_positions: list[int] = field(default_factory=list)  # of the tokens the budget is over, in order
    # For each distinct budget, the tail's live entries once 0, 1, 2, ... tokens of the answer are stored.
    tail_lengths: list[list[int]] = field(default_factory=list)

    def plan_turn(
        self, is_vision: Tensor, stored: int, budgets: Sequence[TokenBudget | None], whole_cache: bool, max_steps: int
    ) -> TurnPlan:
        """Plan a turn of new tokens after `stored` tokens of the last answer; `max_steps` decode steps can follow.

        Changes nothing. Raises `UserError` for limits that no budget may have.
        """
        start = self.length + stored
        # The system prefix is what stands before the first image; without any image it is the first token.
        system = 0
        if self.length == 0 and not whole_cache:
            vision = is_vision.nonzero()[:, 0].tolist()
            system = vision[0] if vision else min(1, len(is_vision))
        others = range(len(is_vision)) if whole_cache else (~is_vision).nonzero()[:, 0].tolist()
        new = [start + i for i in others[system:]]
        evictable = [*self.evictable_positions, *range(self.length, start), *new]

        past_tails = [lengths[stored] for lengths in self.tail_lengths] or [0] * len(budgets)
        tails = []
        for past, budget in zip(past_tails, budgets, strict=True):
            lengths = _tail_lengths(past + len(new), budget, len(evictable), max_steps)
            protected = limits_of(budget, len(evictable), 0)[1]
            recent_from = _position(evictable, start + len(is_vision), len(evictable) - protected)
            tails.append(TailPlan(past, lengths, recent_from))
        prompt = Prompt(len(is_vision), int(is_vision.sum()))
        return TurnPlan(self.sample, start, is_vision, prompt, system, evictable, tails)

    def begin_turn(self, plan: TurnPlan) -> None:
        """Take in the turn that was planned."""
        self.length = plan.first_position + len(plan.is_vision)
        self.vision_positions += [plan.first_position + i for i in plan.is_vision.nonzero()[:, 0].tolist()]
        self.evictable_positions = plan.evictable_positions
        self.tail_lengths = [tail.lengths for tail in plan.tails]

    def step_table(self, group: int, budget: TokenBudget | None, max_steps: int) -> list[tuple[int, bool, int]]:
        """For each decode step: tail entries to attend to, whether one is evicted, first position that is protected."""
        lengths = self.tail_lengths[group]
        before = len(self.evictable_positions)
        table = []
        for step in range(max_steps):
            protected = limits_of(budget, before, step + 1)[1]
            evicts = lengths[step + 1] <= lengths[step]
            protected_from = _position(self.evictable_positions, self.length, before + step + 1 - protected)
            table.append((lengths[step] + 1, evicts, protected_from))
        return table


def _tail_lengths(entries: int, budget: TokenBudget | None, before: int, max_steps: int) -> list[int]:
    """Live entries of a tail that has `entries` before prefill evicts any; a step adds one and evicts at most one."""
    allowed = limits_of(budget, before, 0)[0]
    lengths = [min(entries, allowed)]
    for answer in range(1, max_steps + 1):
        last, allowed = allowed, limits_of(budget, before, answer)[0]
        if allowed < last:
            raise UserError(
                f"{type(budget).__name__}.limits falls from {last} to {allowed} at answer {answer} "
                "(expected a number that does not fall while the answer grows)"
            )
        lengths.append(min(lengths[-1] + 1, allowed))
    return lengths


def _position(evictable: Sequence[int], length: int, order: int) -> int:
    """Original position of the order-th evictable token; the tokens of the answer follow one another from `length`."""
    order = max(order, 0)
    return evictable[order] if order < len(evictable) else length + order - len(evictable)


def limits_of(budget: TokenBudget | None, before: int, answer: int) -> tuple[int, int]:
    """A budget's limits; without a budget everything stays, and nothing needs protection.

    Raises `UserError` unless they are two integers, 0 <= second <= first.
    """
    if budget is None:
        return before + answer, 0
    pair = budget.limits(before, answer)
    integers = isinstance(pair, tuple) and len(pair) == 2 and all(type(number) is int for number in pair)
    if not integers or not 0 <= pair[1] <= pair[0]:
        raise UserError(
            f"{type(budget).__name__}.limits({before}, {answer}) is {pair!r} "
            "(expected how many entries stay, and how many of those are protected, as two integers)"
        )
    return pair


def plan_entries(policy: Policy, layer_idx: int, group: int, plan: TurnPlan, past: EntryCounts) -> EntryCounts:
    """What one row will hold in a layer after this turn's prefill, the entries of earlier turns included."""
    tail = plan.tails[group]
    if policy.whole_cache:
        return EntryCounts(tail=tail.lengths[0], tail_capacity=tail.capacity)
    vision = core = policy.vision_tokens(plan.prompt, layer_idx)
    selection = policy.vision_at(layer_idx)
    if selection is not None:
        counts = selection.counts(plan.prompt)
        vision = min(counts.keep, vision)
        core = min(counts.core, vision)
    return EntryCounts(
        past.vision + vision, past.core + core, past.system + plan.system, tail.lengths[0], tail.capacity
    )


def check_turn(policy: Policy, is_vision: Tensor, length: int, context_length: int) -> None:
    """Raise `UserError` if a turn of these tokens, after `length` earlier ones, cannot be prefilled."""
    if len(is_vision) == 0 or is_vision[-1]:
        raise UserError("a prompt has to end in text: policies score with the attention of its last token")
    if length + len(is_vision) > context_length:
        raise UserError(f"the sequence has {length + len(is_vision)} tokens, the model's context only {context_length}")
    policy.check_prompt(Prompt(len(is_vision), int(is_vision.sum())))
