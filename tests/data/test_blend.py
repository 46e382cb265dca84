"""Fractions are exact over a period, cursors count without gaps, and a change of blend repeats and loses nothing."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mamba_pretrain.data.blend import MAX_PERIOD, BlendSchedule, Segment, named_shares, whole_shares

weights = st.lists(st.decimals("0.001", "9", places=3).map(float), min_size=1, max_size=5)


def test_shares_are_the_decimals_as_written():
    assert whole_shares([0.7, 0.2, 0.1]) == [7, 2, 1]
    assert whole_shares([1.0, 1.0, 1.0]) == [1, 1, 1]
    assert whole_shares([3, 1.5]) == [2, 1]


def test_long_periods_are_rounded_and_no_source_vanishes():
    shares = whole_shares([123_456_789.0, 987_654_321.0, 1e-9])
    assert min(shares) >= 1
    assert abs(sum(shares) - MAX_PERIOD) <= 1
    assert shares[0] / sum(shares) == pytest.approx(123_456_789 / 1_111_111_110, abs=2 / MAX_PERIOD)


@settings(max_examples=100, deadline=None)
@given(weights=weights, period=st.integers(0, 10**6))
def test_fractions_are_exact_over_any_period(weights, period):
    shares = named_shares({f"s{i}": weight for i, weight in enumerate(weights)})
    total = sum(shares.values())
    blend = BlendSchedule([Segment(0, shares, {})])
    before, after = blend.cursors_at(period * total), blend.cursors_at((period + 1) * total)
    assert {name: after[name] - before[name] for name in shares} == shares
    if total < MAX_PERIOD - 10:
        for i, weight in enumerate(weights):
            assert shares[f"s{i}"] * sum(weights) == pytest.approx(weight * total)


@settings(max_examples=50, deadline=None)
@given(weights=weights, first=st.integers(0, 10**9), count=st.integers(1, 500))
def test_cursors_count_every_draw_once(weights, first, count):
    blend = BlendSchedule.constant({f"s{i}": weight for i, weight in enumerate(weights)})
    samples = np.arange(first, first + count)
    cursors = blend.cursors_at(first)
    rows_seen = []
    for name, rows, draws in blend.place(samples):
        assert draws.tolist() == list(range(cursors[name], cursors[name] + len(draws)))
        cursors[name] += len(draws)
        rows_seen += rows.tolist()
    assert sorted(rows_seen) == list(range(count))
    assert cursors == blend.cursors_at(first + count)


@settings(max_examples=50, deadline=None)
@given(weights=weights, sample=st.integers(0, 10**5))
def test_every_beginning_has_nearly_the_right_shares(weights, sample):
    shares = named_shares({f"s{i}": weight for i, weight in enumerate(weights)})
    cursors = BlendSchedule([Segment(0, shares, {})]).cursors_at(sample)
    for name, share in shares.items():
        assert abs(cursors[name] - sample * share / sum(shares.values())) <= 0.5 + len(shares) / 2


def draws_of(blend: BlendSchedule, first: int, end: int) -> dict[str, list[int]]:
    """All draws of each source over a range of samples."""
    found: dict[str, list[int]] = {}
    for name, _, draws in blend.place(np.arange(first, end)):
        found.setdefault(name, []).extend(draws.tolist())
    return found


blends = st.dictionaries(st.sampled_from("abcd"), st.integers(1, 9).map(float), min_size=1)


@settings(max_examples=50, deadline=None)
@given(changes=st.lists(st.tuples(blends, st.integers(0, 300)), min_size=1, max_size=5))
def test_changes_of_the_blend_repeat_and_lose_nothing(changes):
    """Sources come and go; each one's draws are 0, 1, 2, ... over the whole run."""
    blend = BlendSchedule.constant(changes[0][0])
    position = changes[0][1]
    for weights, length in changes[1:]:
        saved = json.loads(json.dumps(blend.state()))
        blend = BlendSchedule.from_state(saved).followed_by(weights, position)
        position += length
    for name, draws in draws_of(blend, 0, position).items():
        assert sorted(draws) == list(range(len(draws))), name


def test_a_change_applies_from_its_sample_on():
    blend = BlendSchedule.constant({"a": 1.0, "b": 1.0}).followed_by({"a": 1.0, "b": 3.0}, 100)
    assert {name: len(draws) for name, draws in draws_of(blend, 0, 100).items()} == {"a": 50, "b": 50}
    assert {name: len(draws) for name, draws in draws_of(blend, 100, 200).items()} == {"a": 25, "b": 75}


def test_the_same_blend_written_otherwise_is_no_change():
    blend = BlendSchedule.constant({"a": 0.5, "b": 0.5})
    assert blend.followed_by({"b": 3.0, "a": 3.0}, 10) is blend


def test_going_back_before_a_change_forgets_it():
    blend = BlendSchedule.constant({"a": 1.0, "b": 1.0}).followed_by({"a": 1.0}, 100).followed_by({"b": 1.0}, 50)
    assert [segment.start for segment in blend.segments] == [0, 50]
    assert draws_of(blend, 50, 60) == {"b": list(range(25, 35))}
