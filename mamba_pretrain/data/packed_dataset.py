"""Samples of fixed length cut from a dataset's shards, with the true document boundaries of the index."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_tools.errors import UserError
from data_tools.indexed import IndexedDataset
from data_tools.manifest import Manifest
from mamba_pretrain.data.packing import Packing, pack


@dataclass(frozen=True)
class Sample:
    """``length + 1`` tokens (int64), and for each the number of the document it belongs to within the sample; -1 marks padding."""

    tokens: np.ndarray
    document: np.ndarray


class TokenStream:
    """The documents of one split's shards as one sequence of tokens. Opening reads no index and no tokens."""

    def __init__(self, folder: Path, split: str) -> None:
        manifest = Manifest.load(folder)
        if split not in manifest.splits or not manifest.splits[split].shards:
            known = ", ".join(manifest.splits) or "none"
            raise UserError(f"dataset {folder} has no split {split!r} (it has {known}); tokenize with --validation-fraction to make one")
        self.folder = folder
        self.manifest = manifest
        self.shards = [IndexedDataset(folder / shard.path) for shard in manifest.splits[split].shards]
        for shard, described in zip(self.shards, manifest.splits[split].shards, strict=True):
            if shard.n_tokens != described.tokens:
                raise UserError(
                    f"{shard.bin_path} holds {shard.n_tokens} tokens, its manifest says {described.tokens}; run `mamba-data verify {folder}`"
                )
        self.ends = np.cumsum([shard.n_tokens for shard in self.shards])
        self.n_tokens = int(self.ends[-1])

    def ranges(self, first: int, count: int) -> list[tuple[int, int, int]]:
        """(shard, first token within it, count) of a range of the stream."""
        found = []
        shard = int(np.searchsorted(self.ends, first, side="right"))
        while count:
            start = int(self.ends[shard - 1]) if shard else 0
            here = min(count, int(self.ends[shard]) - first)
            if here:
                found.append((shard, first - start, here))
            first, count, shard = first + here, count - here, shard + 1
        return found

    def read(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens (int64) of a range, and the number of the document of each, counted from the range's first."""
        tokens = np.empty(count, dtype=np.int64)
        document = np.zeros(count, dtype=np.int32)
        at, number = 0, 0
        for shard, begin, here in self.ranges(first, count):
            data = self.shards[shard]
            tokens[at : at + here] = data.read(begin, here)
            # Byte pointers are sorted: the documents that begin inside the range are found by binary search, whatever the shard's size.
            size = data.dtype.itemsize
            lowest, highest = np.searchsorted(data.pointers, [(begin + 1) * size, (begin + here) * size])
            number += at > 0 and self._begins_document(data, begin)
            starts = data.pointers[lowest:highest] // size - begin
            document[at : at + here] = number
            if len(starts):
                marks = np.zeros(here, dtype=np.int32)
                np.add.at(marks, starts, 1)
                document[at : at + here] += np.cumsum(marks)
                number = int(document[at + here - 1])
            at += here
        return tokens, document

    @staticmethod
    def _begins_document(data: IndexedDataset, token: int) -> bool:
        place = int(np.searchsorted(data.pointers, token * data.dtype.itemsize))
        return place < len(data) and int(data.pointers[place]) == token * data.dtype.itemsize

    def will_need(self, first: int, count: int) -> None:
        """Tells the operating system to read a range ahead."""
        if not hasattr(os, "posix_fadvise"):
            return
        for shard, begin, here in self.ranges(first, count):
            data = self.shards[shard]
            os.posix_fadvise(data.descriptor, begin * data.dtype.itemsize, here * data.dtype.itemsize, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        """Closes the shards."""
        for shard in self.shards:
            shard.close()


class PackedDataset:
    """Sample j of a split: ``length + 1`` tokens, of which the first ``length`` are read and the last ``length`` predicted."""

    def __init__(self, folder: Path, split: str, length: int, packing: str, pad_tail: bool = False) -> None:
        """``pad_tail`` adds a last, padded sample for the stream's remaining tokens (validation wants every token)."""
        self.stream = TokenStream(folder, split)
        self.length = length
        self.packed: Packing | None = None
        if packing == "best-fit":
            self.packed = self._pack()
            self.n_samples = self.packed.n_bins
        else:
            targets = self.stream.n_tokens - 1
            self.n_samples = -(-targets // length) if pad_tail else targets // length
        if self.n_samples < 1:
            raise UserError(
                f"data.sequence_length {length} is longer than the {split} split of {folder}, which has {self.stream.n_tokens} tokens; "
                "choose a shorter sequence or add data"
            )

    def _pack(self) -> Packing:
        starts, lengths, offset = [], [], 0
        for shard in self.stream.shards:
            starts.append(shard.document_starts() + offset)
            lengths.append(np.asarray(shard.lengths))
            offset += shard.n_tokens
        return pack(np.concatenate(starts), np.concatenate(lengths), self.length + 1)

    def __len__(self) -> int:
        """Number of samples."""
        return self.n_samples

    def pieces(self, index: int) -> list[tuple[int, int]]:
        """The ranges (first token, count) of the stream that make up a sample."""
        if self.packed is None:
            first = index * self.length
            return [(first, min(self.length + 1, self.stream.n_tokens - first))]
        p = self.packed
        return [(int(p.piece_first[i]), int(p.piece_length[i])) for i in p.order[p.starts[index] : p.starts[index + 1]]]

    def __getitem__(self, index: int) -> Sample:
        """Sample ``index``."""
        tokens = np.zeros(self.length + 1, dtype=np.int64)
        document = np.full(self.length + 1, -1, dtype=np.int32)
        at, number = 0, 0
        for first, count in self.pieces(index):
            tokens[at : at + count], documents = self.stream.read(first, count)
            document[at : at + count] = documents + number
            number = int(document[at + count - 1]) + 1
            at += count
        return Sample(tokens, document)

    def will_need(self, index: int) -> None:
        """Tells the operating system that a sample will be read soon."""
        for first, count in self.pieces(index):
            self.stream.will_need(first, count)
