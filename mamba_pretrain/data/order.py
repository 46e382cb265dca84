"""The order of samples: a pseudo-random permutation that is computed, not stored.

A Feistel network (arXiv cs/0202004 gives the construction over arbitrary sets by cycle walking) permutes [0, n): any index is mapped in constant
time and memory, so an epoch of a billion samples needs no list, and resuming is arithmetic.
"""

from __future__ import annotations

import hashlib

import numpy as np

ROUNDS = 6


class Permutation:
    """A bijection of [0, n), a pure function of (n, key)."""

    def __init__(self, n: int, key: str) -> None:
        """``key`` is any text; equal keys give equal permutations."""
        if n < 1:
            raise ValueError(f"a permutation needs at least one element, not {n}")
        self.n = n
        self._half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
        self._mask = np.uint64((1 << int(self._half)) - 1)
        digests = [hashlib.sha256(f"{key}:{round_}".encode()).digest() for round_ in range(ROUNDS)]
        self._keys = [np.uint64(int.from_bytes(digest[:8], "little")) for digest in digests]

    def __call__(self, indices: np.ndarray) -> np.ndarray:
        """Images (int64) of ``indices`` (any integer dtype, each in [0, n))."""
        values = self._network(np.asarray(indices).astype(np.uint64))
        # The network permutes a power of four of at most 4 n elements; walking its cycles until they re-enter [0, n) keeps it a bijection.
        outside = np.flatnonzero(values >= self.n)
        while outside.size:
            values[outside] = self._network(values[outside])
            outside = outside[values[outside] >= self.n]
        return values.astype(np.int64)

    def _network(self, values: np.ndarray) -> np.ndarray:
        left, right = values >> self._half, values & self._mask
        for key in self._keys:
            left, right = right, left ^ (_mix(right ^ key) & self._mask)
        return (left << self._half) | right


def _mix(x: np.ndarray) -> np.ndarray:
    """The 64-bit finaliser of SplitMix64: every input bit reaches every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def epoch_order(n: int, seed: int, source: str, first: int, count: int, shuffle: bool = True) -> np.ndarray:
    """Sample indices (int64) number [first, first + count) of an endless pass over ``n`` samples, a new permutation each epoch.

    ``source`` is the dataset's fingerprint: sources of equal length must not be visited in the same order.
    """
    positions = np.arange(first, first + count, dtype=np.int64)
    epochs, within = np.divmod(positions, n)
    if not shuffle:
        return within
    order = np.empty(count, dtype=np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        order[here] = Permutation(n, f"{seed}:{source}:{epoch}")(within[here])
    return order
