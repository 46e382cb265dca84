"""What a training step reads."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

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
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return Batch(**{name: value.pin_memory() if isinstance(value, torch.Tensor) else value for name, value in values.items()})
