"""The tokens of one split as a single stream over all its shards, with the documents' boundaries from the indices."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from data_tools.errors import UserError
from data_tools.indexed import IndexedDataset
from data_tools.manifest import Shard
from mamba_pretrain.data.storage import DatasetFolder, Reads


class TokenStream:
    """Tokens 0 ... n_tokens - 1 and documents 0 ... n_documents - 1 of a split, numbered through its shards in the manifest's order.

    Nothing is read when it is opened: indices are memory-mapped and searched, so that a split of any size opens at once. Safe to use from
    several threads.
    """

    def __init__(self, folder: DatasetFolder, split: str) -> None:
        """Raises UserError for a split that the dataset lacks and for missing, truncated or mixed shards."""
        self.path = folder.path
        self.split = split
        shards = _shards(folder, split)
        self.indices, self._storage = folder.open([shard.path for shard in shards])
        for shard, index in zip(shards, self.indices, strict=True):
            if (index.n_tokens, index.dtype) != (shard.tokens, self.indices[0].dtype):
                raise UserError(
                    f"{index.bin_path} holds {index.n_tokens} tokens of {index.dtype}, but {folder.path}/manifest.json describes {shard.tokens} of "
                    f"{self.indices[0].dtype}; restore the dataset or tokenize again"
                )
        self.dtype = self.indices[0].dtype
        self._starts = [_DocumentStarts(index) for index in self.indices]
        self._token_base = [0, *accumulate(index.n_tokens for index in self.indices)]
        self._token_bases = np.array(self._token_base)
        self._document_base = [0, *accumulate(len(starts) for starts in self._starts)]
        self.n_tokens = self._token_base[-1]
        self.n_documents = self._document_base[-1]

    def locate(self, first: np.ndarray, count: np.ndarray, place: np.ndarray) -> Reads:
        """Where ``count`` (m,) tokens from token ``first`` (m,) on lie, and that they go to token ``place`` (m,) of a buffer."""
        bases, itemsize = self._token_bases, self.dtype.itemsize
        pieces = []
        shard = np.searchsorted(bases, first, side="right") - 1
        while len(first):
            offset = first - bases[shard]
            taken = np.minimum(count, bases[shard + 1] - first)
            pieces.append(np.stack([shard, offset * itemsize, taken * itemsize, place * itemsize]))
            goes_on = np.flatnonzero(count > taken)  # into the next shard
            first, place = (first + taken)[goes_on], (place + taken)[goes_on]
            count, shard = (count - taken)[goes_on], shard[goes_on] + 1
        return Reads(*np.concatenate(pieces, axis=1).tolist()) if pieces else Reads([], [], [], [])

    def expect(self, reads: Reads) -> None:
        """Has what will be read soon be on its way by then."""
        self._storage.expect(reads)

    def read(self, reads: Reads, buffer: np.ndarray) -> None:
        """Fills a contiguous buffer of this stream's dtype."""
        self._storage.read(reads, buffer.reshape(-1).view(np.uint8).data)

    def document_starts(self, documents: np.ndarray) -> np.ndarray:
        """First token (m,) of each document (m,)."""
        found = []
        for document in documents.tolist():
            shard = bisect_right(self._document_base, document) - 1
            found.append(self._token_base[shard] + self._starts[shard].of(document - self._document_base[shard]))
        return np.array(found, dtype=np.int64)

    def starts_within(self, first: np.ndarray, length: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Documents that begin after token ``first[i]`` and at or before ``first[i] + length[i]``: (i, tokens past ``first[i]``), each (k,)."""
        rows: list[int] = []
        tokens: list[int] = []
        for row, (begin, span) in enumerate(zip(first.tolist(), length.tolist(), strict=True)):
            for shard in range(self._shard(begin), self._shard(min(begin + span, self.n_tokens - 1)) + 1):
                base = self._token_base[shard]
                found = self._starts[shard].within(begin - base, begin + span - base)
                tokens += [base + token for token in found]
                rows += [row] * len(found)
        where = np.array(rows, dtype=np.int64)
        return where, np.array(tokens, dtype=np.int64) - first[where]

    def _shard(self, token: int) -> int:
        return bisect_right(self._token_base, token) - 1

    def document_lengths(self) -> np.ndarray:
        """Tokens (n_documents,) of every document: reads all indices, 4 bytes of memory a document."""
        return np.concatenate([starts.lengths() for starts in self._starts])

    def close(self) -> None:
        """Closes the files."""
        self._storage.close()


def _shards(folder: DatasetFolder, split: str) -> list[Shard]:
    splits = folder.manifest.splits
    if split not in splits:
        raise UserError(f"{folder.path} has no split {split!r}, it has: {', '.join(sorted(splits)) or 'none'}; tokenize it with that split")
    shards = [shard for shard in splits[split].shards if shard.tokens]
    if not shards:
        raise UserError(f"the split {split!r} of {folder.path} is empty; tokenize more text")
    return shards


class _DocumentStarts:
    """Where the documents of one shard begin, looked up in its memory-mapped index."""

    def __init__(self, index: IndexedDataset) -> None:
        self._itemsize = index.dtype.itemsize
        self._end = index.n_tokens * self._itemsize
        self._pointers = np.asarray(index.pointers)
        if len(index.documents) != len(index.lengths) + 1:  # Megatron-LM lets a document consist of several sequences; ours do not
            self._pointers = self._pointers[index.documents[:-1]]
        # A view of Python integers: numpy's own search would copy the index, as its arrays are not aligned in the file.
        self._view = self._pointers.view(np.uint8).data.cast("q")

    def __len__(self) -> int:
        return len(self._view)

    def of(self, document: int) -> int:
        """First token of a document, within the shard."""
        return self._view[document] // self._itemsize

    def within(self, first: int, last: int) -> list[int]:
        """First tokens of the documents that begin after token ``first`` and at or before ``last``, within the shard."""
        view, itemsize, key = self._view, self._itemsize, last * self._itemsize
        place = upper_bound(view, first * itemsize, self._end) if first >= 0 else 0
        found = []
        while place < len(view) and (pointer := view[place]) <= key:
            found.append(pointer // itemsize)
            place += 1
        return found

    def lengths(self) -> np.ndarray:
        """Tokens (n,) of each document."""
        return np.diff(self._pointers, append=self._end) // self._itemsize


def upper_bound(values: Sequence[int], key: int, end: int) -> int:
    """How many of the sorted ``values`` are at or below ``key``; values and key lie between 0 and ``end``.

    As values grow about evenly, guessing by proportion touches a few pages of a cold index, where bisection touches one for each doubling of
    its size: each guess aims a little to one side and the next to the other, so that both bounds close in.
    """
    low, high, floor, ceiling, side = 0, len(values), 0, end, 1
    while high - low > 512 and ceiling > floor:  # 512 pointers are a page
        span = high - low
        guess = low + (key - floor) * span // (ceiling - floor) + side * math.isqrt(span)
        # Halving from time to time bounds the number of guesses whatever the values.
        guess = min(max(guess, low), high - 1) if abs(side) == 1 else low + span // 2
        side = {1: -1, -1: 2, 2: 1}[side]
        value = values[guess]
        if value <= key:
            low, floor = guess + 1, value
        else:
            high, ceiling = guess, value
    return bisect_right(values, key, low, high)
