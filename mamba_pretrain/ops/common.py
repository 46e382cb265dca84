"""Helpers shared by the ops."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor


def document_starts(seq_idx: Tensor | None) -> Tensor | None:
    """(b, l) bool: True where a document begins after position 0. Position 0 is never marked: an initial state flows into it."""
    if seq_idx is None:
        return None
    starts = torch.zeros_like(seq_idx, dtype=torch.bool)
    starts[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    return starts


def without_autocast(tensor: Tensor) -> AbstractContextManager:
    """Inside, matmuls keep the dtype they are given: autocast would lower fp32 states to bf16."""
    return torch.autocast(tensor.device.type, enabled=False)
