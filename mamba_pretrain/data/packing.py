"""How documents become sequences: which tokens stand where, and where documents begin.

Both packings answer from integers alone, for any samples in any order: ``concat`` by arithmetic and a search in the index, ``best-fit`` from
a plan of groups of equal sequences.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from data_tools.packing import best_fit_plan
from mamba_pretrain.data.packed_dataset import TokenStream


@dataclass(frozen=True)
class Layout:
    """Where the tokens of m sequences come from. A row has ``sequence_length + 1`` places; the last one is only a target.

    Reads: ``count`` (k,) tokens from token ``first`` (k,) of the stream go to row ``row`` (k,) at column ``column`` (k,).
    Documents begin at (``start_row``, ``start_column``), each (j,), besides column 0 of every row; the place before has no target inside its
    document. ``fill`` (m,): places that hold tokens of the stream; padding follows.
    """

    row: np.ndarray
    column: np.ndarray
    first: np.ndarray
    count: np.ndarray
    start_row: np.ndarray
    start_column: np.ndarray
    fill: np.ndarray


class Packing(Protocol):
    """Samples 0 ... n_samples - 1 of a stream."""

    n_samples: int
    n_padding: int

    def layout(self, samples: np.ndarray) -> Layout:
        """Of sample numbers (m,)."""


class ConcatPacking:
    """Sample j holds tokens j * length ... (j + 1) * length of the stream; the last of them is only a target.

    With ``keep_tail`` what remains at the end is one more, padded sample: then every token but the first is a target once.
    """

    def __init__(self, stream: TokenStream, length: int, keep_tail: bool = False) -> None:
        self.stream = stream
        self.length = length
        targets = max(0, stream.n_tokens - 1)
        self.n_samples = -(-targets // length) if keep_tail else targets // length
        self.n_padding = self.n_samples * length - targets if keep_tail else 0

    def layout(self, samples: np.ndarray) -> Layout:
        """See ``Packing``."""
        first = samples * self.length
        count = np.minimum(self.length + 1, self.stream.n_tokens - first)
        start_row, start_column = self.stream.starts_within(first, count - 1)
        rows = np.arange(len(samples))
        return Layout(rows, np.zeros_like(rows), first, count, start_row, start_column, count)


class BestFitPacking:
    """Documents whole where they fit into a sequence; longer ones give full sequences and a remainder that is packed like a document.

    Samples 0 ... n_full - 1 are the full pieces of long documents, the others are the bins of a best-fit-decreasing plan over the lengths of
    all that is shorter. The last token of a document has no target; that of a full piece has, as its document goes on.

    Cost: all document lengths are read when it is opened (some 30 ns a document), and it keeps 4 bytes a document, and 16 for each that is
    longer than a sequence.
    """

    def __init__(self, stream: TokenStream, length: int) -> None:
        self.stream = stream
        self.length = length
        documents = stream.document_lengths()
        self._long = np.flatnonzero(documents >= length)
        self._first_piece = np.concatenate([[0], np.cumsum(documents[self._long] // length)])
        rest = documents % length
        counts = np.bincount(rest, minlength=length + 1)
        self._plan = best_fit_plan(counts, length)
        small = rest.astype(np.uint16) if length <= 1 << 16 else rest  # numpy sorts 16-bit integers by radix: linear time
        self._by_length = np.argsort(small, kind="stable").astype(np.uint32 if len(rest) < 1 << 32 else np.int64)
        self._first_of_length = np.concatenate([[0], np.cumsum(counts)])
        self.n_full = int(self._first_piece[-1])
        self.n_samples = self.n_full + self._plan.n_bins
        self.n_padding = self.n_samples * length - stream.n_tokens

    def layout(self, samples: np.ndarray) -> Layout:
        """See ``Packing``."""
        full, mixed = np.flatnonzero(samples < self.n_full), np.flatnonzero(samples >= self.n_full)
        first, count = self._full_pieces(samples[full])
        row, column, document, length = self._bins(samples[mixed] - self.n_full)
        fill = np.zeros(len(samples), dtype=np.int64)
        fill[full] = count
        fill[mixed] = np.bincount(row, weights=length, minlength=len(mixed)).astype(np.int64)
        inner = column > 0
        return Layout(
            row=np.concatenate([full, mixed[row]]),
            column=np.concatenate([np.zeros_like(full), column]),
            first=np.concatenate([first, self._ends(document) - length]),
            count=np.concatenate([count, length]),
            start_row=mixed[row][inner],
            start_column=column[inner],
            fill=fill,
        )

    def _full_pieces(self, pieces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(first token, tokens to read) of full pieces (m,): one token more where the document goes on, as the last target."""
        place = np.searchsorted(self._first_piece, pieces, side="right") - 1
        document = self._long[place]
        first = self.stream.document_starts(document) + (pieces - self._first_piece[place]) * self.length
        return first, np.minimum(self.length + 1, self._ends(document) - first)

    def _bins(self, bins: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(row, column, document, length) of everything in the bins (m,), by row and column."""
        plan = self._plan
        group = np.searchsorted(plan.first_bin, bins, side="right") - 1
        row, slot = ragged_ranges(plan.first_slot[group], plan.first_slot[group + 1] - plan.first_slot[group])
        each, turn = ragged_ranges(np.zeros_like(slot), plan.multiplicity[slot])
        row, slot = row[each], slot[each]
        length = plan.length[slot]
        item = plan.first_item[slot] + (bins - plan.first_bin[group])[row] * plan.multiplicity[slot] + turn
        document = self._by_length[self._first_of_length[length] + item].astype(np.int64)
        before = np.cumsum(length) - length
        column = before - before[np.searchsorted(row, row)] if len(row) else before
        return row, column, document, length

    def _ends(self, documents: np.ndarray) -> np.ndarray:
        """Token after the last one of each document (m,)."""
        ends = np.full(len(documents), self.stream.n_tokens, dtype=np.int64)
        inner = documents + 1 < self.stream.n_documents
        ends[inner] = self.stream.document_starts(documents[inner] + 1)
        return ends


def ragged_ranges(first: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The ranges ``first[i] ... first[i] + count[i] - 1`` one after another: (i, value), each (sum of count,)."""
    rows = np.repeat(np.arange(len(first)), count)
    return rows, np.arange(len(rows)) - np.repeat(np.cumsum(count) - count - first, count)
