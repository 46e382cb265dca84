"""Best-fit-decreasing over counts: every item is in one bin, no bin overflows, and it is best fit."""

from __future__ import annotations

import bisect
import time

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.packing import BestFitPlan, best_fit_plan


def contents(plan: BestFitPlan) -> list[list[int]]:
    """Lengths of the items in each bin."""
    bins = []
    for group in range(len(plan.first_bin) - 1):
        slots = range(plan.first_slot[group], plan.first_slot[group + 1])
        items = [int(plan.length[slot]) for slot in slots for _ in range(plan.multiplicity[slot])]
        bins += [items] * int(plan.first_bin[group + 1] - plan.first_bin[group])
    return bins


def item_by_item(lengths: list[int], capacity: int) -> int:
    """Bins of the plain algorithm."""
    room: list[int] = []
    for length in sorted(lengths, reverse=True):
        place = bisect.bisect_left(room, length)
        left = (room.pop(place) if place < len(room) else capacity) - length
        bisect.insort(room, left)
    return len(room)


@settings(max_examples=200, deadline=None)
@given(capacity=st.integers(1, 40), data=st.data())
def test_equals_the_plain_algorithm(capacity, data):
    lengths = data.draw(st.lists(st.integers(1, capacity), max_size=80))
    plan = best_fit_plan(np.bincount(lengths, minlength=capacity + 1), capacity)
    bins = contents(plan)
    assert sorted(item for items in bins for item in items) == sorted(lengths)
    assert all(0 < sum(items) <= capacity for items in bins)
    assert plan.n_bins == len(bins) == item_by_item(lengths, capacity)


@settings(max_examples=100, deadline=None)
@given(capacity=st.integers(1, 30), data=st.data())
def test_items_are_numbered_without_gaps(capacity, data):
    lengths = data.draw(st.lists(st.integers(1, capacity), max_size=60))
    plan = best_fit_plan(np.bincount(lengths, minlength=capacity + 1), capacity)
    numbers: dict[int, list[int]] = {}
    for group in range(len(plan.first_bin) - 1):
        bins = int(plan.first_bin[group + 1] - plan.first_bin[group])
        for slot in range(plan.first_slot[group], plan.first_slot[group + 1]):
            first, many = int(plan.first_item[slot]), int(plan.multiplicity[slot]) * bins
            numbers.setdefault(int(plan.length[slot]), []).extend(range(first, first + many))
    for length, found in numbers.items():
        assert sorted(found) == list(range(lengths.count(length)))


def test_a_million_lengths_take_a_moment():
    lengths = np.clip(np.random.default_rng(0).lognormal(6.2, 1.0, 1_000_000).astype(int), 1, 2048)
    began = time.perf_counter()
    plan = best_fit_plan(np.bincount(lengths, minlength=2049), 2048)
    assert time.perf_counter() - began < 1.0
    assert lengths.sum() / (plan.n_bins * 2048) > 0.999
