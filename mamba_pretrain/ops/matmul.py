"""Matmuls whose result is stored in another dtype than that of their operands, without a second pass over memory where the device can."""

from __future__ import annotations

import torch
from torch import Tensor


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
    """``total += a @ b`` in place, summed in ``total``'s dtype; returns ``total``."""
    if a.dtype == total.dtype:
        return torch.addmm(total, a, b, out=total)  # in place; but unlike addmm_, torch's FLOP counter knows it
    if _writes_fp32(a, total.dtype):
        return torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    return total.add_(torch.mm(a, b))


def _writes_fp32(a: Tensor, dtype: torch.dtype) -> bool:
    return a.device.type == "cuda" and dtype == torch.float32 and a.dtype in (torch.bfloat16, torch.float16)
