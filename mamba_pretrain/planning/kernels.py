"""Stand-ins for the GPU kernels: they allocate and keep what the kernels allocate and keep, and compute nothing.

Under fake tensors they let the real model code run at its real size on any machine. What each keeps is read off the kernels' sources
(mamba_ssm's Triton code, causal_conv1d, this project's CUDA kernels) and checked against measured peaks by ``benchmarks/plan_memory.py``.
"""

from __future__ import annotations

import contextlib
import itertools
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mamba_pretrain.ops import beside, registry
from mamba_pretrain.ops.rms_norm import output_dtype

NAME = "planned"
SCAN_CHECKPOINT = 16  # steps between the states that the CUDA selective scan keeps


def _like(t: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
    return None if t is None else torch.empty(t.shape, dtype=dtype or t.dtype, device=t.device)


def _fp32(t: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=t.device)


def _cheap(t: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Memory of a kernel that is no scan: allocated by another op than scans' results are, which recomputation tells apart."""
    strides = [*itertools.accumulate(reversed(shape[1:]), operator.mul, initial=1)][::-1]
    return torch.empty_strided(shape, strides, dtype=dtype, device=t.device)


def _workspace(t: Tensor, *shape: int) -> Tensor:
    """Freed when the kernel ends."""
    return _cheap(t, shape)


def is_scan_result(operation: Any) -> bool:
    """Whether an op allocates a result of a scan's stand-in."""
    return operation is torch.ops.aten.empty.memory_format


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, *rest: Tensor | None) -> Tensor:
        b, length, d = u.shape
        states = _fp32(u, b, -(-length // SCAN_CHECKPOINT), A.shape[1], d)
        ctx.save_for_backward(u, delta, A, B, C, *rest, states)
        return torch.empty(u.shape, dtype=u.dtype, device=u.device)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        u, delta, A, B, C, D, z, bias, seq_idx, _ = ctx.saved_tensors
        partials = _workspace(u, *u.shape[:2], u.shape[2] // 4)  # per-block sums of dB and dC before they are reduced
        found = [_like(t) for t in (u, delta, A, B, C, D)]
        dz = None if z is None else beside.gradient_of(z)
        del partials, seq_idx
        return *found, dz, _like(bias), None


class _SSD(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *rest: Any) -> Tensor:
        *optional, chunk = rest
        b, length, h, p = x.shape
        workspace = _ssd_workspace(x, B, chunk)
        out = torch.empty(b, length, h, p, dtype=x.dtype, device=x.device)
        cumulative = _fp32(x, b, h, length)
        ctx.save_for_backward(x, dt, A, B, C, *optional, out, cumulative)
        ctx.chunk = chunk
        del workspace
        return out

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, dt, A, B, C, D, z, bias, seq_idx, _, _ = ctx.saved_tensors
        workspace = _ssd_workspace(x, B, ctx.chunk), _ssd_workspace(x, B, ctx.chunk)
        dB, dC = _like(B, torch.float32), _like(C, torch.float32)
        dx, ddt = _like(x), beside.gradient_of(dt)
        found = dx, ddt, _like(A), _like(dB, B.dtype), _like(dC, C.dtype), _like(D), _like(z), _like(bias)
        del workspace, seq_idx
        return *found, None, None


def _ssd_workspace(x: Tensor, B: Tensor, chunk: int) -> tuple[Tensor, ...]:
    """fp32 step sizes, the states of all chunks, and the scores C B^T inside the chunks."""
    b, length, h, p = x.shape
    n_chunks = -(-length // chunk)
    states = _workspace(x, b, n_chunks, h, p, B.shape[-1])
    return _workspace(x, b, h, length), states, _workspace(x, b, n_chunks, B.shape[2], chunk, chunk)


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, bias, seq_idx)
        return _cheap(x, x.shape, x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, _ = ctx.saved_tensors
        return beside.gradient_of(x), _like(weight), _like(bias), None


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, residual: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        total = _cheap(x, x.shape)
        ctx.save_for_backward(total, weight, _cheap(x, x.shape[:-1]))
        ctx.x_dtype, ctx.has_residual = x.dtype, residual is not None
        return _cheap(x, x.shape, dtype), total

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dtotal: Tensor) -> tuple[Tensor | None, ...]:
        total, weight, _ = ctx.saved_tensors
        return _like(total, ctx.x_dtype), _like(weight), _like(total) if ctx.has_residual else None, None


class _GatedRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, z: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, z, weight, _cheap(x, x.shape[:-1]))
        return _cheap(x, x.shape, dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, z, weight, _ = ctx.saved_tensors
        return _like(x), beside.gradient_of(z), _like(weight), None


def _selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Any, z: Any, delta_bias: Any, seq_idx: Any, **_: Any
) -> Any:
    return _SelectiveScan.apply(u, delta, A, B, C, D, z, delta_bias, seq_idx)


def _ssd_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Any, z: Any, dt_bias: Any, seq_idx: Any, chunk_size: int, **_: Any
) -> Any:
    return _SSD.apply(x, dt, A, B, C, D, z, dt_bias, seq_idx, chunk_size)


def _causal_conv1d(x: Tensor, weight: Tensor, bias: Any, seq_idx: Any, **_: Any) -> Any:
    return _Conv.apply(x, weight, bias, seq_idx)


def _rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> Any:
    y, total = _RMSNorm.apply(x, weight, residual, output_dtype(x))
    return y if residual is None else (y, total)


def _gated_rms_norm(x: Tensor, z: Tensor, weight: Tensor, **_: Any) -> Any:
    return _GatedRMSNorm.apply(x, z, weight, output_dtype(x))


STAND_INS: dict[str, Callable[..., Any]] = {
    "selective_scan": _selective_scan,
    "ssd_scan": _ssd_scan,
    "causal_conv1d": _causal_conv1d,
    "rms_norm": _rms_norm,
    "gated_rms_norm": _gated_rms_norm,
}


@contextlib.contextmanager
def stand_ins() -> Iterator[None]:
    """Inside, the ops run through the stand-ins. They are registered for as long as this lasts only: nothing else may ever pick them."""
    registry.implementations()  # the real ones first
    for op, function in STAND_INS.items():
        registry.register(op, NAME, priority=-1)(function)
    try:
        with registry.using(**dict.fromkeys(STAND_INS, NAME)):
            yield
    finally:
        for op in STAND_INS:
            registry._implementations[op].pop(NAME)
        for key in [key for key in registry._choices if key[1] == NAME]:
            registry._choices.pop(key)
