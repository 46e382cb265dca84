"""Where documents begin in a packed batch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Boundaries:
    """Document boundaries of a batch: states, convolutions and attention never cross them.

    ``seq_idx`` (b, l) int32: a document begins where it changes along the length. ``positions`` (b, l) int64: restart at 0 with each
    document.
    """

    seq_idx: Tensor
    positions: Tensor

    @classmethod
    def from_seq_idx(cls, seq_idx: Tensor) -> Boundaries:
        """Boundaries whose positions are counted from ``seq_idx`` (b, l)."""
        return cls(seq_idx.to(torch.int32), torch.arange(seq_idx.shape[1], device=seq_idx.device) - _starts(seq_idx))

    @cached_property
    def attention_mask(self) -> Tensor:
        """(b, 1, l, l) bool: whether query i may see key j: same document and j <= i. Built once per batch, shared by all layers."""
        # Compares starts, not seq_idx: two documents of a row may carry the same number if another stands between them.
        start = torch.arange(self.positions.shape[1], device=self.positions.device) - self.positions
        same = start[:, :, None] == start[:, None, :]
        return same.tril().unsqueeze(1)


def _starts(seq_idx: Tensor) -> Tensor:
    """(b, l): index at which the document of each token begins."""
    index = torch.arange(seq_idx.shape[1], device=seq_idx.device)
    begins = torch.ones_like(seq_idx, dtype=torch.bool)
    begins[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    return torch.where(begins, index, 0).cummax(dim=1).values
