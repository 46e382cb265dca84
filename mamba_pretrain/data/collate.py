"""Samples to batches: labels, boundaries, positions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from mamba_pretrain.data.batch import IGNORE, Batch
from mamba_pretrain.data.packed_dataset import Sample


def collate(samples: Sequence[Sample], sample_ids: Sequence[int], mask_cross_document: bool) -> Batch:
    """A batch of samples. Targets in padding are ignored, and those that begin a document, unless ``mask_cross_document`` is off."""
    tokens = np.stack([sample.tokens for sample in samples])
    document = np.stack([sample.document for sample in samples])
    labels = tokens[:, 1:].copy()
    labels[document[:, 1:] < 0] = IGNORE
    if mask_cross_document:
        labels[document[:, 1:] != document[:, :-1]] = IGNORE
    inside = document[:, :-1]
    # Padding is a document of its own, with a number that no other has.
    seq_idx = np.where(inside < 0, inside.max(axis=1, keepdims=True) + 1, inside).astype(np.int32)
    return Batch(
        tokens=torch.from_numpy(np.ascontiguousarray(tokens[:, :-1])),
        labels=torch.from_numpy(labels),
        seq_idx=torch.from_numpy(seq_idx),
        positions=torch.from_numpy(positions(seq_idx)),
        n_valid=int((labels != IGNORE).sum()),
        sample_ids=torch.tensor(sample_ids, dtype=torch.int64),
    )


def positions(seq_idx: np.ndarray) -> np.ndarray:
    """(b, l) int64: distance of each token from the beginning of its document in the row."""
    index = np.arange(seq_idx.shape[1], dtype=np.int64)
    begins = np.zeros(seq_idx.shape, dtype=np.int64)
    begins[:, 1:] = np.where(seq_idx[:, 1:] != seq_idx[:, :-1], index[1:], 0)
    return index - np.maximum.accumulate(begins, axis=1)
