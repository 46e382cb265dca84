"""What a training step reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mamba_pretrain.data.packing import Layout

IGNORE = -100


@dataclass(frozen=True, eq=False)
class Batch:
    """A micro-batch of packed sequences.

    ``tokens`` (b, l) int64. ``labels`` (b, l) int64: the next token, or -100 where the loss is not taken. ``seq_idx`` (b, l) int32: a document
    begins where it changes. ``positions`` (b, l) int64 restart at 0 with each document. ``n_valid``: labels that are not -100.
    ``sample_ids`` (b,) int64: global indices of the sequences in the run's order; -1 for padding.
    """

    tokens: Tensor
    labels: Tensor
    seq_idx: Tensor
    positions: Tensor
    n_valid: int
    sample_ids: Tensor

    def pinned(self) -> Batch:
        """The same batch in page-locked memory, from which copies to a GPU do not block."""
        return self.map(Tensor.pin_memory)

    def rows(self, rows: slice | Tensor) -> Batch:
        """The batch of some rows."""
        return self.map(lambda tensor: tensor[rows])

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """A batch of changed tensors."""
        labels = change(self.labels)
        n_valid = self.n_valid if labels.shape == self.labels.shape else int(np.count_nonzero(labels.numpy() != IGNORE))
        return Batch(change(self.tokens), labels, change(self.seq_idx), change(self.positions), n_valid, change(self.sample_ids))

    @classmethod
    def concatenate(cls, parts: Sequence[Batch]) -> Batch:
        """One batch with the rows of all parts, in order."""

        def joined(name: str) -> Tensor:
            return torch.cat([getattr(part, name) for part in parts])

        return cls(
            tokens=joined("tokens"),
            labels=joined("labels"),
            seq_idx=joined("seq_idx"),
            positions=joined("positions"),
            n_valid=sum(part.n_valid for part in parts),
            sample_ids=joined("sample_ids"),
        )


def empty_batch(rows: int, length: int) -> Batch:
    """(rows, length) of padding: every label is ignored, so that it adds nothing to any loss."""
    return Batch(
        tokens=torch.zeros(rows, length, dtype=torch.int64),
        labels=torch.full((rows, length), IGNORE),
        seq_idx=torch.zeros(rows, length, dtype=torch.int32),
        positions=torch.arange(length).repeat(rows, 1),
        n_valid=0,
        sample_ids=torch.full((rows,), -1),
    )


def assemble(layout: Layout, buffer: np.ndarray, sample_ids: np.ndarray, mask_cross_document: bool = True) -> Batch:
    """A batch from sequences as they were read: ``buffer`` (m, length + 1) in the dataset's dtype, ``sample_ids`` (m,)."""
    length = buffer.shape[1] - 1
    labels = buffer[:, 1:].astype(np.int64)
    if mask_cross_document:
        labels[layout.start_row, layout.start_column - 1] = IGNORE
    for row in np.flatnonzero(layout.fill <= length):
        labels[row, max(0, layout.fill[row] - 1) :] = IGNORE
    seq_idx, positions = number_documents(layout, length)
    return Batch(
        tokens=torch.from_numpy(buffer[:, :-1].astype(np.int64)),
        labels=torch.from_numpy(labels),
        seq_idx=torch.from_numpy(seq_idx),
        positions=torch.from_numpy(positions),
        n_valid=int(np.count_nonzero(labels != IGNORE)),
        sample_ids=torch.from_numpy(sample_ids),
    )


def number_documents(layout: Layout, length: int) -> tuple[np.ndarray, np.ndarray]:
    """``seq_idx`` (m, length) int32, which counts the documents of each row from 0, and ``positions`` (m, length) int64.

    Padding counts as a document of its own.
    """
    rows = len(layout.fill)
    row = np.concatenate([np.arange(rows), layout.start_row, np.arange(rows)])
    column = np.concatenate([np.zeros(rows, dtype=np.int64), layout.start_column, layout.fill])
    begins = np.unique((row * length + column)[column < length])
    spans = np.diff(begins, append=rows * length)
    number = np.arange(len(begins)) - np.searchsorted(begins, begins // length * length)
    seq_idx = np.repeat(number.astype(np.int32), spans)
    positions = np.arange(rows * length) - np.repeat(begins, spans)
    return seq_idx.reshape(rows, length), positions.reshape(rows, length)
