"""In which order samples are read: a permutation that is computed, not stored.

A generalised Feistel network (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002) permutes the grid of a x b points with
a * b just above n; the few points past n are walked through the network again until they land inside. Any element costs the same
whatever n is, so that resuming needs no replay and a billion samples need no memory.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np

ROUNDS = 6  # two rounds are visibly not random; from four on chi-square and lag-1 correlation are within noise


def round_keys(name: str, rounds: int = ROUNDS) -> np.ndarray:
    """``rounds`` keys (uint64), a pure function of ``name``."""
    digests = [hashlib.sha256(f"{name}:{number}".encode()).digest() for number in range(rounds)]
    return np.array([int.from_bytes(digest[:8], "little") for digest in digests], dtype=np.uint64)


def permute(index: np.ndarray, n: int, keys: np.ndarray) -> np.ndarray:
    """Images (m,) int64 of ``index`` (m,) under a permutation of range(n), n < 2**62; every key array gives another permutation."""
    if n <= 1:
        return np.zeros_like(index, dtype=np.int64)
    rows = math.isqrt(n - 1) + 1
    columns = -(-n // rows)
    image = _network(index.astype(np.uint64), rows, columns, keys)
    while len(outside := np.flatnonzero(image >= n)):
        image[outside] = _network(image[outside], rows, columns, keys)
    return image.astype(np.int64)


def _network(point: np.ndarray, rows: int, columns: int, keys: np.ndarray) -> np.ndarray:
    """One pass over points (m,) uint64 of the grid: rounds move, in turn, the row by a hash of the column and the column by one of the row."""
    moved, fixed = np.divmod(point, np.uint64(columns))
    size, other = rows, columns
    for key in keys:
        moved += _hash(fixed + key, size)
        moved[moved >= size] -= np.uint64(size)
        moved, fixed, size, other = fixed, moved, other, size
    row, column = (moved, fixed) if len(keys) % 2 == 0 else (fixed, moved)
    return row * np.uint64(columns) + column


def _hash(value: np.ndarray, size: int) -> np.ndarray:
    """Hash of (m,) uint64 into range(size), size < 2**32: the finaliser of SplitMix64 (Steele et al., 2014), scaled down by its upper half."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    value ^= value >> np.uint64(31)
    return ((value >> np.uint64(32)) * np.uint64(size)) >> np.uint64(32)


class SampleOrder:
    """The order of one source's samples: draw k of the run is sample ``k % n`` of epoch ``k // n``, each epoch in a new order."""

    def __init__(self, n: int, name: str, shuffle: bool = True) -> None:
        """``n`` samples an epoch; ``name`` (dataset fingerprint and seed) chooses the order."""
        self.n = n
        self.name = name
        self.shuffle = shuffle

    def samples(self, draws: np.ndarray) -> np.ndarray:
        """Sample numbers (m,) int64 of draws (m,) int64."""
        epochs, places = np.divmod(draws, self.n)
        if not self.shuffle:
            return places
        found = np.empty_like(places)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            found[chosen] = permute(places[chosen], self.n, round_keys(f"{self.name}:{epoch}"))
        return found
