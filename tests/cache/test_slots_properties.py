"""Slot arithmetic for rows with any counts, and tails under any budget that does not fall."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import given
from hypothesis import strategies as st

from minivlm.cache.cores import first_slots
from minivlm.cache.counts import EntryCounts, SequenceState
from minivlm.cache.slots import BUCKET, LARGE_BUCKET, SlotLayout, bucket

small = st.integers(0, 90)


@st.composite
def entry_counts(draw) -> EntryCounts:
    vision, tail = draw(small), draw(small)
    return EntryCounts(vision, draw(st.integers(0, vision)), draw(small), tail, tail + draw(small))


@given(st.integers(0, 10**6))
def test_a_bucket_is_the_next_multiple(slots):
    assert bucket(slots) % BUCKET == 0 and 0 <= bucket(slots) - slots < BUCKET


@given(st.lists(entry_counts(), min_size=1, max_size=5))
def test_every_row_fits_its_layout_and_little_is_left_over(rows):
    layout = SlotLayout.of(rows)
    for counts in rows:
        vision, prefilled = layout.vision(counts), layout.prefilled(counts)
        assert 0 <= vision.start == prefilled.start
        assert vision.stop - vision.start == counts.vision
        assert layout.tail_start - vision.stop == counts.system
        assert prefilled.stop - layout.tail_start == counts.tail
        assert layout.tail_start + counts.tail_capacity <= layout.slots
    needed = max(counts.fixed for counts in rows) + max(counts.tail_capacity for counts in rows)
    assert layout.slots - needed <= 2 * (BUCKET - 1)


@given(st.lists(st.lists(entry_counts(), min_size=1, max_size=3), min_size=1, max_size=5))
def test_a_grown_layout_holds_every_batch_and_nothing_more(batches):
    layouts = [SlotLayout.of(rows, LARGE_BUCKET) for rows in batches]
    grown = layouts[0]
    for needed in layouts:
        before, grown = grown, grown.grown(needed)
        assert grown.tail_start >= max(before.tail_start, needed.tail_start)
        assert grown.tail >= max(before.tail, needed.tail)
        assert (grown == before) == (before.grown(needed) == before)
    assert grown.tail_start == max(layout.tail_start for layout in layouts)
    assert grown.tail == max(layout.tail for layout in layouts)
    assert grown.tail_start % LARGE_BUCKET == grown.tail % LARGE_BUCKET == 0


@given(entry_counts(), st.data())
def test_live_slots_are_a_window_with_at_most_one_hole(counts, data):
    layout = SlotLayout.of([counts])
    tail = data.draw(st.integers(0, max(counts.tail_capacity - 1, 0)))
    places = st.integers(0, tail)  # a hole in the tail, or the first unused slot
    next_place = data.draw(st.lists(places, min_size=1, max_size=4))
    live = layout.live(counts, tail, torch.tensor(next_place))
    window = range(layout.tail_start - counts.fixed, layout.tail_start + tail + 1)
    for slots, place in zip(live.tolist(), next_place, strict=True):
        assert sorted(slots) == [slot for slot in window if slot != layout.tail_start + place]


@given(st.lists(st.lists(st.booleans(), min_size=9, max_size=9), min_size=1, max_size=4), st.integers(0, 9))
def test_first_slots_are_the_first_that_are_set(mask, count):
    for row, slots in zip(mask, first_slots(torch.tensor(mask), count).tolist(), strict=True):
        are_set = [i for i, one in enumerate(row) if one][:count]
        assert slots == are_set + [0] * (count - len(are_set))


@dataclass(frozen=True)
class SomeBudget:
    """A share of all entries stays, but at least a number; the most recent ones are protected."""

    share: float
    least: int
    protected: int

    def limits(self, before: int, answer: int) -> tuple[int, int]:
        stay = max(int(self.share * (before + answer)), self.least)
        return stay, min(self.protected, stay)


budgets = st.builds(SomeBudget, st.floats(0, 1), small, small)
turns = st.lists(st.tuples(st.lists(st.booleans(), max_size=30), st.integers(0, 6)), min_size=1, max_size=3)


@given(turns, st.none() | budgets)
def test_a_tail_grows_by_one_and_stays_within_its_budget(turns, budget):
    """Some turns of a conversation, each with room for 6 steps of which some are taken."""
    state, stored, steps = SequenceState(0), 0, 6
    for vision, taken in turns:
        is_vision = torch.tensor([False, *vision, False])
        entries = state.tail_lengths[0][stored] if state.tail_lengths else 0
        plan = state.plan_turn(is_vision, stored, [budget], False, steps)
        tail, before = plan.tails[0], len(plan.evictable_positions)
        assert plan.evictable_positions == sorted(set(plan.evictable_positions))
        assert tail.past == entries and len(tail.lengths) == steps + 1
        assert all(0 <= after - length <= 1 for length, after in zip(tail.lengths, tail.lengths[1:], strict=False))
        state.begin_turn(plan)
        table = state.step_table(0, budget, steps)
        held = tail.lengths[0]
        for step, (attended, evicts, _) in enumerate(table):
            assert attended == held + 1 <= tail.capacity
            held = attended - evicts
            assert held == tail.lengths[step + 1]
            if budget is not None:
                assert held <= budget.limits(before, step + 1)[0]
        assert budget is not None or not any(evicts for _, evicts, _ in table)
        stored = taken
