"""The order is a permutation, looks random, and costs the same anywhere."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mamba_pretrain.data.order import SampleOrder, permute, round_keys


@settings(max_examples=100, deadline=None)
@given(n=st.integers(1, 3000), name=st.text(max_size=8))
def test_is_a_permutation(n, name):
    image = permute(np.arange(n), n, round_keys(name))
    assert np.array_equal(np.sort(image), np.arange(n))


@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 2**61), data=st.data())
def test_any_element_of_any_size(n, data):
    index = np.array(sorted(data.draw(st.sets(st.integers(0, n - 1), max_size=20))), dtype=np.int64)
    image = permute(index, n, round_keys("x"))
    assert ((image >= 0) & (image < n)).all()
    assert len(np.unique(image)) == len(index)


@pytest.mark.parametrize("n", [1_000_000, 999_983, 524_289])
def test_is_uniform(n):
    """Over eight keys: chi-square of the steps between neighbours, lag-1 correlation, and where single samples land, all within noise."""
    chi_squares, correlations = [], []
    for key in range(8):
        image = permute(np.arange(n), n, round_keys(f"uniform {key}"))
        counts = np.histogram(np.diff(image) % n, bins=50, range=(0, n))[0]
        chi_squares.append(((counts - counts.mean()) ** 2 / counts.mean()).sum())
        correlations.append(np.corrcoef(image[:-1], image[1:])[0, 1] * np.sqrt(n))
    # The sum of eight chi-squares with 49 degrees of freedom has mean 392 and deviation 28; the correlations are standard normal.
    assert abs(np.sum(chi_squares) - 392) < 5 * 28
    assert np.abs(correlations).max() < 5
    assert abs(np.sum(np.square(correlations)) - 8) < 5 * np.sqrt(16)


def test_two_rounds_would_fail_the_uniformity_test():
    n = 1_000_000
    image = permute(np.arange(n), n, round_keys("uniform 0", rounds=2))
    counts = np.histogram(np.diff(image) % n, bins=50, range=(0, n))[0]
    assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() > 10 * 49


def test_first_place_of_many_keys_is_uniform():
    n, keys = 1000, 3000
    places = [int(permute(np.array([7]), n, round_keys(f"key {key}"))[0]) for key in range(keys)]
    counts = np.histogram(places, bins=20, range=(0, n))[0]
    assert ((counts - keys / 20) ** 2 / (keys / 20)).sum() < 19 + 5 * np.sqrt(38)


def test_the_order_never_changes_between_versions():
    """A run resumed by a newer version must find the same samples."""
    assert permute(np.arange(8), 1000, round_keys("pinned")).tolist() == PINNED


PINNED = [81, 500, 639, 118, 88, 91, 391, 662]


@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 300), first=st.integers(0, 10**6), count=st.integers(1, 700))
def test_every_epoch_visits_every_sample_once(n, first, count):
    order = SampleOrder(n, "data")
    draws = np.arange(first, first + count)
    samples = order.samples(draws)
    for epoch in np.unique(draws // n):
        seen = samples[draws // n == epoch]
        assert len(np.unique(seen)) == len(seen)
    alone = [int(order.samples(np.array([draw]))[0]) for draw in draws[:5]]
    assert alone == samples[:5].tolist()


def test_epochs_and_names_have_orders_of_their_own():
    epochs = SampleOrder(500, "data").samples(np.arange(1000)).reshape(2, 500)
    assert (epochs[0] == epochs[1]).mean() < 0.05
    assert (epochs[0] == SampleOrder(500, "other").samples(np.arange(500))).mean() < 0.05


def test_without_shuffling_the_dataset_is_read_in_its_order():
    assert SampleOrder(5, "data", shuffle=False).samples(np.arange(12)).tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]
