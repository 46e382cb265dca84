"""Best-fit packing: documents kept whole where they fit, by counts of lengths instead of one by one.

Best-fit-decreasing over the histogram of lengths (arXiv:2404.10830 packs the same way, document by document): all documents of one length are
placed together into all bins of one remaining space, so a million documents take milliseconds and the result is deterministic.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Packing:
    """Bins of pieces: bin i holds pieces ``order[starts[i]:starts[i + 1]]``; a piece is a range of the token stream."""

    piece_first: np.ndarray  # int64: first token of each piece
    piece_length: np.ndarray  # int32
    order: np.ndarray  # int64: pieces, bin after bin
    starts: np.ndarray  # int64: n_bins + 1
    capacity: int

    @property
    def n_bins(self) -> int:
        """Number of bins, one sample each."""
        return len(self.starts) - 1

    @property
    def fill(self) -> float:
        """Share of the bins' tokens that are no padding."""
        return float(self.piece_length.sum()) / max(1, self.n_bins * self.capacity)


def cut(firsts: np.ndarray, lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Documents as pieces of at most ``capacity`` tokens.

    The pieces of a long document overlap by one token, so that every token but the first is a target exactly once. Documents of fewer than two
    tokens hold no target and are left out.
    """
    stride = capacity - 1
    useful = lengths >= 2
    firsts, lengths = firsts[useful], lengths[useful]
    counts = -(-(lengths.astype(np.int64) - 1) // stride)
    document = np.repeat(np.arange(len(lengths)), counts)
    within = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
    piece_first = firsts[document] + within * stride
    piece_length = np.minimum(capacity, lengths[document] - within * stride)
    return piece_first.astype(np.int64), piece_length.astype(np.int32)


def pack(firsts: np.ndarray, lengths: np.ndarray, capacity: int) -> Packing:
    """Packs documents (first token and length of each) into bins of ``capacity`` tokens."""
    piece_first, piece_length = cut(firsts, lengths, capacity)
    by_length = np.argsort(-piece_length, kind="stable")
    values, counts = np.unique(piece_length, return_counts=True)
    bins = _best_fit(values[::-1].tolist(), counts[::-1].tolist(), capacity)
    # Pieces of a length are handed out in the order of the stream.
    next_piece = dict(zip(values[::-1].tolist(), np.concatenate([[0], np.cumsum(counts[::-1])[:-1]]).tolist(), strict=True))
    order = np.empty(len(piece_length), dtype=np.int64)
    starts, filled = [0], 0
    for contents, n_bins in bins:
        block = np.empty((n_bins, sum(count for _, count in contents)), dtype=np.int64)
        column = 0
        for length, count in contents:
            first = next_piece[length]
            block[:, column : column + count] = by_length[first : first + count * n_bins].reshape(n_bins, count)
            next_piece[length] = first + count * n_bins
            column += count
        order[filled : filled + block.size] = block.reshape(-1)
        starts.extend(range(filled + block.shape[1], filled + block.size + 1, block.shape[1]))
        filled += block.size
    return Packing(piece_first, piece_length, order, np.array(starts, dtype=np.int64), capacity)


def _best_fit(lengths: list[int], counts: list[int], capacity: int) -> list[tuple[tuple[tuple[int, int], ...], int]]:
    """Groups of equal bins: (((length, pieces of it), ...), number of such bins), for lengths in falling order."""
    groups: dict[int, list[tuple[tuple[tuple[int, int], ...], int]]] = {}
    spaces: list[int] = []  # ascending keys of `groups`

    def put(space: int, contents: tuple[tuple[int, int], ...], n_bins: int) -> None:
        if space not in groups:
            groups[space] = []
            bisect.insort(spaces, space)
        groups[space].append((contents, n_bins))

    def take(space: int) -> tuple[tuple[tuple[int, int], ...], int]:
        found = groups[space].pop()
        if not groups[space]:
            del groups[space]
            spaces.remove(space)
        return found

    for length, count in zip(lengths, counts, strict=True):
        left = count
        while left:
            place = bisect.bisect_left(spaces, length)
            space = spaces[place] if place < len(spaces) else capacity
            contents, n_bins = take(space) if place < len(spaces) else ((), left)
            each = min(space // length, left)
            used = min(n_bins, left // each)
            put(space - each * length, (*contents, (length, each)), used)
            if contents and n_bins > used:
                put(space, contents, n_bins - used)
            left -= used * each
    return [group for space in spaces for group in groups[space]]
