"""Best-fit-decreasing packing over counts of lengths: millions of documents in milliseconds, and the plan stays small.

Items of equal length are alike, and so are bins with equal contents: both are handled as counts (Ding et al., "Fewer Truncations Improve
Language Modeling", 2024, use the same heuristic item by item).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class BestFitPlan:
    """Groups of bins with equal contents, as ragged arrays.

    Group g is bins ``first_bin[g] ... first_bin[g + 1] - 1`` (G + 1,). Its contents are slots ``first_slot[g] ... first_slot[g + 1] - 1``
    (G + 1,): each of its bins holds ``multiplicity`` (S,) items of ``length`` (S,), and the group takes the items of that length from number
    ``first_item`` (S,) on.
    """

    capacity: int
    first_bin: np.ndarray
    first_slot: np.ndarray
    length: np.ndarray
    multiplicity: np.ndarray
    first_item: np.ndarray

    @property
    def n_bins(self) -> int:
        """Bins of all groups."""
        return int(self.first_bin[-1])


def best_fit_plan(counts: np.ndarray, capacity: int) -> BestFitPlan:
    """Packs ``counts[length]`` items of each length 1 ... capacity, longest first, each into the fullest bin that still holds it.

    ``counts`` (capacity + 1,) int64; ``counts[0]`` is not looked at. The same counts give the same plan.
    """
    bins = _OpenBins(capacity)
    for length in range(capacity, 0, -1):
        remaining = int(counts[length])
        while remaining:
            remaining -= bins.place(length, remaining)
    return _plan(bins.groups(), capacity)


Contents = tuple[tuple[int, int], ...]  # (length, items of it) of one bin


class _OpenBins:
    """Counts of bins with equal contents, by the room that is left in them."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._by_room: list[list[tuple[int, Contents]]] = [[] for _ in range(capacity + 1)]
        self._occupied = 0  # bit r is set where bins with room r exist

    def place(self, length: int, n: int) -> int:
        """Places up to ``n`` items of a length into one group of bins; returns how many."""
        room, bins, contents = self._fullest(length, n)
        fit = room // length
        filled = min(bins, n // fit)
        self._put(room - fit * length, filled, (*contents, (length, fit)))
        placed = filled * fit
        if filled < bins and (rest := n - placed):
            self._put(room - rest * length, 1, (*contents, (length, rest)))
            filled, placed = filled + 1, placed + rest
        if contents:
            self._put(room, bins - filled, contents)
        return placed

    def _fullest(self, length: int, n: int) -> tuple[int, int, Contents]:
        """(room, bins, contents) of the open bins with the least room for ``length``, taken out; or as many new bins as ``n`` items can need."""
        candidates = self._occupied >> length
        if not candidates:
            return self._capacity, n, ()
        room = length + (candidates & -candidates).bit_length() - 1
        bins, contents = self._by_room[room].pop()
        if not self._by_room[room]:
            self._occupied &= ~(1 << room)
        return room, bins, contents

    def _put(self, room: int, bins: int, contents: Contents) -> None:
        if bins:
            self._by_room[room].append((bins, contents))
            self._occupied |= 1 << room

    def groups(self) -> list[tuple[int, Contents]]:
        """All (bins, contents), the fullest first."""
        return [group for groups in self._by_room for group in groups]


def _plan(groups: list[tuple[int, Contents]], capacity: int) -> BestFitPlan:
    used = np.zeros(capacity + 1, dtype=np.int64)
    slots: list[tuple[int, int, int]] = []
    for bins, contents in groups:
        for length, multiplicity in contents:
            slots.append((length, multiplicity, int(used[length])))
            used[length] += bins * multiplicity
    table = np.array(slots, dtype=np.int64).reshape(-1, 3)
    return BestFitPlan(
        capacity=capacity,
        first_bin=np.cumsum([0, *(bins for bins, _ in groups)], dtype=np.int64),
        first_slot=np.cumsum([0, *(len(contents) for _, contents in groups)], dtype=np.int64),
        length=table[:, 0],
        multiplicity=table[:, 1],
        first_item=table[:, 2],
    )
