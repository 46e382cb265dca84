"""Matmuls whose result is stored in another dtype than that of their operands, without a second pass over memory where the device can.

Adding products over few inner numbers to a sum takes the time of reading and writing the sum. On Hopper a Triton kernel does it.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import NamedTuple

import torch
from torch import Tensor

from mamba_pretrain.ops.common import multiprocessors
from mamba_pretrain.ops.kernel_arguments import on_device_of
from mamba_pretrain.ops.operator import operator
from mamba_pretrain.ops.triton_launch import launch

MAX_INNER = 256  # of the kernel; a program holds that many numbers of each of its columns
MIN_ROWS = 4096  # below, there is too little to do for the programs to walk


class Tile(NamedTuple):
    """Rows and columns of a tile, warps of a program, stages of its walk, and programs that a multiprocessor should hold."""

    rows: int
    columns: int
    warps: int
    stages: int
    resident: int


# By the most inner numbers that they are for, the fastest of those timed on an H100. With 160 numbers a program takes 104 KiB of shared memory or
# more: a walk of three stages by one program hides more than two programs of two stages each.
TILES = {
    128: Tile(rows=64, columns=128, warps=4, stages=2, resident=3),
    MAX_INNER: Tile(rows=64, columns=128, warps=4, stages=3, resident=1),
}


def matmul(a: Tensor, b: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """``a @ b`` (n, m) of (n, k) and (k, m) in ``dtype``; written into ``out`` where given, which has that dtype.

    On CUDA an fp32 result of 16-bit operands is the matmul's own fp32 sum; elsewhere it went through the operands' dtype.
    """
    if a.dtype == dtype:
        return torch.mm(a, b, out=out)
    if _writes_fp32(a, dtype):
        return torch.mm(a, b, out_dtype=torch.float32, out=out)
    product = torch.mm(a, b)
    return product.to(dtype) if out is None else out.copy_(product)


def add_matmul(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``total += a @ b`` in place, summed in ``total``'s dtype; returns ``total``.  total (n, m), a (n, k), b (k, m)."""
    if _few_inner(total, a, b):
        add_few_inner(total, a, b)
        return total
    if a.dtype == total.dtype:
        return torch.addmm(total, a, b, out=total)  # in place; but unlike addmm_, torch's FLOP counter knows it
    if _writes_fp32(a, total.dtype):
        return torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    return total.add_(torch.mm(a, b))


def _writes_fp32(a: Tensor, dtype: torch.dtype) -> bool:
    return a.device.type == "cuda" and dtype == torch.float32 and a.dtype in (torch.bfloat16, torch.float16)


def _few_inner(total: Tensor, a: Tensor, b: Tensor) -> bool:
    """Whether the kernel serves: 16-bit matrices on a GPU with few inner numbers and many rows, which lie so that they can be read in vectors."""
    return (
        total.device.type == "cuda"
        and total.dtype == a.dtype == b.dtype
        and total.dtype in (torch.bfloat16, torch.float16)
        and 0 < a.shape[1] <= MAX_INNER
        and total.shape[0] >= MIN_ROWS
        and total.shape[1] % 16 == a.shape[1] % 16 == 0
        and all(t.stride(1) == 1 and t.stride(0) % 16 == t.storage_offset() % 16 == 0 for t in (total, a, b))
        and _kernel_runs(total.get_device())
    )


@functools.cache
def _kernel_runs(device: int) -> bool:
    """On compute capability 9.0, for which it was made: others have too little shared memory for its tile, or compile it otherwise."""
    return torch.cuda.get_device_capability(device) == (9, 0) and importlib.util.find_spec("triton") is not None


@operator("add_few_inner", mutates_args=("total",))
def add_few_inner(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a @ b`` in place, of (n, m), (n, k) and (k, m) with adjacent columns and k at most 256: fp32 sums, rounded once."""
    from mamba_pretrain.ops import triton_matmul_kernels

    (rows, inner), columns = a.shape, b.shape[1]
    first, rest = _inner_parts(inner)
    tile = TILES[next(most for most in TILES if inner <= most)]
    with on_device_of(total):
        launch(
            triton_matmul_kernels.add_product, (_programs(tile, rows, columns, total.device), 1, 1),
            total, a, b, rows, columns, inner, total.stride(0), a.stride(0), b.stride(0),
            first, rest, tile.rows, tile.columns, tile.stages, num_warps=tile.warps,
        )  # fmt: skip


@add_few_inner.register_fake
def _(total, a, b):  # type: ignore[no-untyped-def]
    return None


def _inner_parts(inner: int) -> tuple[int, int]:
    """Two powers of two, or one and 0, that hold ``inner`` numbers: 160 are multiplied as 128 and 32, not as 256."""
    first = max(16, 1 << (inner.bit_length() - 1))
    rest = inner - first
    return first, max(16, 1 << (rest - 1).bit_length()) if rest > 0 else 0


@functools.cache
def _programs(tile: Tile, rows: int, columns: int, device: torch.device) -> int:
    """As many as a device holds, equally many for each block of columns, each with equally many tiles as far as possible."""
    blocks, tiles = -(-columns // tile.columns), -(-rows // tile.rows)
    walk = -(-tiles // max(1, tile.resident * multiprocessors(device) // blocks))
    return blocks * -(-tiles // walk)
