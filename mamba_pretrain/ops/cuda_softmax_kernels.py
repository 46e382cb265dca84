"""Launches of the cross-entropy's own kernel, which reads a row of logits from memory once. The source is ``cuda_src/softmax_gradient.cu``."""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from mamba_pretrain.ops import nvrtc
from mamba_pretrain.ops.common import multiprocessors
from mamba_pretrain.ops.cuda_scan_kernels import RESERVED_SHARED, SCALAR_TYPES
from mamba_pretrain.ops.kernel_arguments import fields, pointer, struct

WARPS = 32
# Of shorter rows a block would hold too little at once to keep the memory busy.
MIN_ROW_BYTES = 32 * 1024
SUMS_BYTES = 2 * WARPS * 8  # of shared memory, for what a block's warps find in two rows

SoftmaxParams = struct(
    "SoftmaxParams",
    **fields("logits targets losses", ctypes.c_void_p),
    **fields("stride ignore_index", ctypes.c_longlong),
    **fields("rows valid", ctypes.c_int),
)


def serves(logits: Tensor) -> bool:
    """Whether the kernel can take logits (rows, columns): two rows fit into a multiprocessor's shared memory and are whole 16-byte vectors."""
    if logits.device.type != "cuda" or logits.shape[0] == 0 or nvrtc.unsupported(logits.device) is not None:
        return False
    size = logits.element_size()
    sizes = logits.shape[1] * size, logits.stride(0) * size, logits.data_ptr()
    return logits.stride(1) == 1 and all(n % 16 == 0 for n in sizes) and MIN_ROW_BYTES <= sizes[0] <= longest_row(logits.get_device())


@functools.cache
def longest_row(device: int) -> int:
    """Bytes of the longest row of which a multiprocessor can hold two."""
    return (torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor - RESERVED_SHARED - SUMS_BYTES) // 2


def softmax_gradient(logits: Tensor, targets: Tensor, losses: Tensor, ignore_index: int, valid: int, gradient: bool) -> None:
    """Writes losses (rows,) fp32 of logits (rows, columns), and, if ``gradient``, softmax - onehot over the logits. targets (rows,) int64."""
    rows, columns = logits.shape
    kernel = _kernel(logits.dtype, columns, gradient, logits.get_device())
    pointers = map(pointer, (logits, targets.contiguous(), losses))
    kernel((min(rows, multiprocessors(logits.device)), 1, 1), SoftmaxParams(*pointers, logits.stride(0), ignore_index, rows, valid))


@functools.cache
def _kernel(dtype: torch.dtype, columns: int, gradient: bool, device: int) -> nvrtc.Kernel:
    macros = {"SCALAR_TYPE": SCALAR_TYPES[dtype], "COLUMNS": columns, "WARPS": WARPS, "GRADIENT": int(gradient)}
    return nvrtc.kernel("softmax_gradient.cu", macros, 32 * WARPS, device)
