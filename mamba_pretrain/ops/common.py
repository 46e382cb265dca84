"""Helpers shared by the ops."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import cast

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from mamba_pretrain.ops.registry import Request


def document_starts(seq_idx: Tensor | None) -> Tensor | None:
    """(b, l) bool: True where a document begins after position 0. Position 0 is never marked: an initial state flows into it."""
    if seq_idx is None:
        return None
    starts = torch.zeros_like(seq_idx, dtype=torch.bool)
    starts[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    return starts


def document_numbers(seq_idx: Tensor | None) -> Tensor | None:
    """(b, l) int32: 0, 1, 2, ... along each row, so that equal numbers mean the same document and 0 the one an initial state belongs to."""
    return _of_same_batch(seq_idx, _count_documents, _last_numbers)


def document_bounds(seq_idx: Tensor | None) -> Tensor | None:
    """(2, b, l) int32: for every position where its document begins, and where it ends (one past its last position).

    The first document of a row, to which an initial state belongs, begins at -1; the last one ends at 2^31 - 1.
    """
    return _of_same_batch(seq_idx, _find_bounds, _last_bounds)


def _of_same_batch(seq_idx: Tensor | None, compute: Callable[[Tensor], Tensor], last: WeakTensorKeyDictionary) -> Tensor | None:
    """``compute(seq_idx)``, remembered: every layer asks for the same, and a small model waits for kernel launches."""
    if seq_idx is None:
        return None
    if torch.compiler.is_compiling() or seq_idx.is_inference():  # which have no version to go by
        return compute(seq_idx)
    found = last.get(seq_idx)
    if found is None or found[0] != seq_idx._version:
        last.clear()
        found = last[seq_idx] = (seq_idx._version, compute(seq_idx))
    return cast(Tensor, found[1])


def _count_documents(seq_idx: Tensor) -> Tensor:
    return cast(Tensor, document_starts(seq_idx)).cumsum(1, dtype=torch.int32)


def _find_bounds(seq_idx: Tensor) -> Tensor:
    starts, last = cast(Tensor, document_starts(seq_idx)), torch.iinfo(torch.int32).max
    position = torch.arange(seq_idx.shape[1], dtype=torch.int32, device=seq_idx.device)
    begins = torch.where(starts, position, -1).cummax(1).values
    after = torch.where(starts, position, last).roll(-1, 1)  # position 0 starts nothing: the last one's is ``last``
    return torch.stack([begins, after.flip(1).cummin(1).values.flip(1)]).to(torch.int32)


_last_numbers, _last_bounds = WeakTensorKeyDictionary(), WeakTensorKeyDictionary()


def triton_unsupported(request: Request) -> str | None:
    """Why a Triton kernel cannot serve. On a CPU it runs under Triton's interpreter only (TRITON_INTERPRET=1), for tests."""
    if request.device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"it needs a CUDA device, not {request.device}"
    if request.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"it computes in fp32, fp16 or bf16, not {request.dtype}"
    return None if _has_triton() else "triton is not installed"


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; 2 where Triton's interpreter stands for one, so that programs share work there too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def without_autocast(tensor: Tensor) -> AbstractContextManager:
    """Inside, matmuls keep the dtype they are given: autocast would lower fp32 states to bf16."""
    return torch.autocast(tensor.device.type, enabled=False)


# Elements that a chain of elementwise steps works on at once: on a CPU such a block stays in the cache from step to step.
ROW_BLOCK_ELEMENTS = {"cpu": 1 << 17, "cuda": 1 << 26}


def row_blocks(shape: tuple[int, ...], device: torch.device) -> Iterator[slice]:
    """Slices of the first of ``shape``'s dimensions that cut a tensor of that shape into blocks of a good size."""
    per_row = max(1, torch.Size(shape[1:]).numel())
    rows = max(1, ROW_BLOCK_ELEMENTS.get(device.type, ROW_BLOCK_ELEMENTS["cpu"]) // per_row)
    return (slice(i, min(i + rows, shape[0])) for i in range(0, shape[0], rows))


def silu_backward(dy: Tensor, x: Tensor) -> Tensor:
    """Gradient through silu(x)."""
    return torch.ops.aten.silu_backward(dy, x)
