"""RMS norm with fused addition, and the gated norm, in Triton: one pass forward, one pass backward, no atomics.

Runs on CUDA, and on a CPU under Triton's interpreter (TRITON_INTERPRET=1) for tests.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from mamba_pretrain.ops import beside, registry
from mamba_pretrain.ops.common import multiprocessors, triton_unsupported
from mamba_pretrain.ops.kernel_arguments import on_device_of
from mamba_pretrain.ops.operator import operator
from mamba_pretrain.ops.registry import Request
from mamba_pretrain.ops.rms_norm import output_dtype
from mamba_pretrain.ops.triton_launch import launch

MAX_CHANNELS = 16384


def unsupported(request: Request) -> str | None:
    """Why the kernels cannot serve."""
    if (why := triton_unsupported(request)) is not None:
        return why
    channels = request.get("group_size") or request["x"].shape[-1]
    return None if channels <= MAX_CHANNELS else f"it normalises at most {MAX_CHANNELS} channels at once, not {channels}"


@registry.register("rms_norm", "triton", priority=30, unsupported=unsupported)
def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> Tensor | tuple[Tensor, Tensor]:
    """See ``rms_norm.rms_norm``."""
    y, new_residual, _ = rms_forward(x, residual, weight, eps, output_dtype(x))
    return y if residual is None else (y, new_residual)


@registry.register("gated_rms_norm", "triton", priority=30, unsupported=unsupported)
def gated_rms_norm(x: Tensor, z: Tensor, weight: Tensor, eps: float, group_size: int | None) -> Tensor:
    """See ``rms_norm.gated_rms_norm``."""
    return gated_forward(x, z, weight, eps, group_size or x.shape[-1], output_dtype(x))[0]


def _rows(t: Tensor) -> Tensor:
    """(..., d) as (rows, d) with adjacent channels: a view wherever the rows are evenly spaced."""
    flat = t.reshape(-1, t.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()


@dataclass(frozen=True)
class Tuning:
    """How a kernel that walks over rows runs: rows that a program loads at once, stages of its loop (as far as memory for what is on its way goes),
    warps that a multiprocessor should hold, channels of a thread, and registers that a thread may have (None: as many as its warps leave)."""

    rows: int
    stages: int
    resident: int
    channels: int
    registers: int | None = None


# With 8 or more channels a thread, Triton lays fp32 and 16-bit rows out differently and brings them together through shared memory. So a thread has 4
# where a loop loads fp32 (rms: the sum and its gradient). Where a loop loads 16 bits alone it may have more, in accesses of 16 bytes: addresses,
# waits and the sum along the row are then spread over more channels. All are the fastest of those that `benchmarks/norms.py --variants` timed on
# an H100.
EVERY_ROW = 1 << 30  # resident warps, so that every row has a program
RMS_CHANNELS = 4
RMS_BACKWARD = Tuning(rows=1, stages=3, resident=32, channels=RMS_CHANNELS)
GATED_FORWARD = Tuning(rows=1, stages=1, resident=EVERY_ROW, channels=8)
# Of groups of up to so many channels. Resident warps times 32 times registers is the register file: two programs a multiprocessor share it, one of
# which computes while the other waits at a barrier; the widest rows fill it with one program that has three rows on their way.
GATED_BACKWARD = {
    2048: Tuning(rows=1, stages=3, resident=16, channels=16, registers=128),
    MAX_CHANNELS: Tuning(rows=1, stages=4, resident=32, channels=4),
}

# For what is on its way: with what Triton takes besides, within the 99 KiB of every GPU from compute capability 8.0 on.
SHARED_BYTES = 80 * 1024
REGISTERS = 64 * 1024  # of a multiprocessor, and the most that a program may have

# Of the sum of parts: 64 bytes of a part in a row of 4 threads, and enough programs for the device from 2048 channels on.
SUM_ROWS, SUM_COLUMNS, SUM_WARPS = 256, 16, 8


def _block(size: int) -> int:
    return 1 << max(4, (size - 1).bit_length())


def _warps(size: int, channels: int) -> int:
    return min(32, max(1, _block(size) // (32 * channels)))


@functools.cache
def _walk(
    tuning: Tuning, rows: int, size: int, groups: int, element_bytes: int, device: torch.device
) -> tuple[int, tuple[int, int, int], dict[str, int]]:
    """Programs a group, enough to fill the device, each with rows to walk over; their ROWS, STAGES and BLOCK; and how they are compiled.

    ``element_bytes``: what the loop loads of a channel.
    """
    block, warps = _block(size), _warps(size, tuning.channels)
    ahead = SHARED_BYTES // (element_bytes * block * tuning.rows)
    programs = max(1, min(-(-rows // tuning.rows), -(-max(1, tuning.resident // warps) * multiprocessors(device) // groups)))
    options = {"num_warps": warps}
    if tuning.registers is not None:
        options["maxnreg"] = min(tuning.registers, REGISTERS // (32 * warps))
    return programs, (tuning.rows, min(tuning.stages, 1 + ahead), block), options


def _element_bytes(*tensors: Tensor | None) -> int:
    return sum(t.element_size() for t in tensors if t is not None)


def _sum_parts(parts: Tensor, weight: Tensor) -> Tensor:
    """The sum over the first dimension of fp32 (parts, n), in the dtype and shape of ``weight``."""
    from mamba_pretrain.ops import triton_norm_kernels

    total, n = weight.new_empty(weight.shape), parts.shape[1]
    launch(
        triton_norm_kernels.sum_parts, (-(-n // SUM_COLUMNS), 1, 1),
        parts, total, len(parts), n, SUM_ROWS, SUM_COLUMNS, num_warps=SUM_WARPS,
    )  # fmt: skip
    return total


@operator("triton_rms_norm_forward")
def rms_forward(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """y (..., d) in ``dtype``; the new residual, fp32 (empty without one); and 1 / rms of every row."""
    from mamba_pretrain.ops import triton_norm_kernels

    y, new_residual, scale = _rms_outputs(x, residual, dtype)
    x, residual, n = _rows(x), None if residual is None else _rows(residual), x.shape[-1]
    with on_device_of(x):
        launch(
            triton_norm_kernels.rms_forward, (len(x), 1, 1),
            x, residual, weight.contiguous(), y, new_residual, scale, x.stride(0), 0 if residual is None else residual.stride(0), n, eps,
            residual is not None, _block(n), num_warps=_warps(n, RMS_CHANNELS),
        )  # fmt: skip
    return y, new_residual, scale


def _rms_outputs(x: Tensor, residual: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    new_residual = x.new_empty(x.shape if residual is not None else (0,), dtype=torch.float32)
    return x.new_empty(x.shape, dtype=dtype), new_residual, x.new_empty(x.shape[:-1], dtype=torch.float32)


@operator("triton_rms_norm_backward")
def rms_backward(
    dy: Tensor, dsum: Tensor | None, total: Tensor, weight: Tensor, scale: Tensor, x_dtype: torch.dtype, has_residual: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x and weight, and of the residual (fp32; empty where there is none, or where x is fp32 too: then it is that of x)."""
    from mamba_pretrain.ops import triton_norm_kernels

    dx, dresidual = _rms_gradients(total, x_dtype, has_residual)
    rows, n = _rows(total), total.shape[-1]
    programs, constants, options = _walk(RMS_BACKWARD, len(rows), n, 1, _element_bytes(dy, dsum, rows), dx.device)
    parts = dx.new_empty((programs, n), dtype=torch.float32)
    with on_device_of(dx):
        launch(
            triton_norm_kernels.rms_backward, (programs, 1, 1),
            dy, dsum, rows, weight.contiguous(), scale, dx, dresidual, parts, rows.stride(0), len(rows), n,
            dsum is not None, dresidual.numel() > 0, *constants, **options,
        )  # fmt: skip
        dweight = _sum_parts(parts, weight)
    return dx, dresidual, dweight


def _rms_gradients(total: Tensor, x_dtype: torch.dtype, has_residual: bool) -> tuple[Tensor, Tensor]:
    separate = has_residual and x_dtype != torch.float32
    dresidual = total.new_empty(total.shape if separate else (0,), dtype=torch.float32)
    return total.new_empty(total.shape, dtype=x_dtype), dresidual


@operator("triton_gated_rms_norm_forward")
def gated_forward(x: Tensor, z: Tensor, weight: Tensor, eps: float, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """y (..., d) in ``dtype``, and 1 / rms of every group."""
    from mamba_pretrain.ops import triton_norm_kernels

    y, scale = _gated_outputs(x, size, dtype)
    x, z, n = _rows(x), _rows(z), x.shape[-1]
    programs, constants, options = _walk(GATED_FORWARD, len(x), size, n // size, _element_bytes(x, z), x.device)
    with on_device_of(x):
        launch(
            triton_norm_kernels.gated_forward, (programs, n // size, 1),
            x, z, weight.contiguous(), y, scale, x.stride(0), z.stride(0), len(x), n, size, eps, *constants, **options,
        )  # fmt: skip
    return y, scale


def _gated_outputs(x: Tensor, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=dtype), x.new_empty((*x.shape[:-1], x.shape[-1] // size), dtype=torch.float32)


@operator(
    "triton_gated_rms_norm_backward",
    schema="(Tensor dy, Tensor x, Tensor z, Tensor weight, Tensor scale, int size) -> (Tensor, Tensor, Tensor)",
)
def gated_backward(dy, x, z, weight, scale, size, gradient=beside.alone):  # type: ignore[no-untyped-def]
    """Gradients of x, z and weight. ``gradient``: where that of z goes."""
    from mamba_pretrain.ops import triton_norm_kernels

    dx, dz = x.new_empty(x.shape), gradient(z)
    x, z, n = _rows(x), _rows(z), x.shape[-1]
    tuned = GATED_BACKWARD[next(most for most in GATED_BACKWARD if size <= most)]
    programs, constants, options = _walk(tuned, len(x), size, n // size, _element_bytes(dy, x, z), dx.device)
    parts = dx.new_empty((programs, n), dtype=torch.float32)
    with on_device_of(dx):
        launch(
            triton_norm_kernels.gated_backward, (programs, n // size, 1),
            dy, x, z, weight.contiguous(), scale, dx, dz, parts, x.stride(0), z.stride(0), dz.view(-1, n).stride(0), len(x), n, size,
            *constants, **options,
        )  # fmt: skip
        return dx, dz, _sum_parts(parts, weight)


# -- shapes for tracing, and gradients ------------------------------------------------------------------------------------------------------


@rms_forward.register_fake
def _(x, residual, weight, eps, dtype):  # type: ignore[no-untyped-def]
    return _rms_outputs(x, residual, dtype)


@rms_backward.register_fake
def _(dy, dsum, total, weight, scale, x_dtype, has_residual):  # type: ignore[no-untyped-def]
    return *_rms_gradients(total, x_dtype, has_residual), weight.new_empty(weight.shape)


@gated_forward.register_fake
def _(x, z, weight, eps, size, dtype):  # type: ignore[no-untyped-def]
    return _gated_outputs(x, size, dtype)


@gated_backward.register_fake
def _(dy, x, z, weight, scale, size):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape), z.new_empty(z.shape), weight.new_empty(weight.shape)


def _setup_rms(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, residual, weight, _, _ = inputs
    _, new_residual, scale = output
    ctx.save_for_backward(x if residual is None else new_residual, weight, scale)
    ctx.x_dtype = x.dtype
    ctx.residual_dtype = None if residual is None else residual.dtype
    ctx.mark_non_differentiable(scale)
    ctx.set_materialize_grads(False)


def _rms_gradient(ctx, dy, dsum, _):  # type: ignore[no-untyped-def]
    total, weight, scale = ctx.saved_tensors
    has_residual = ctx.residual_dtype is not None
    dy = total.new_zeros(total.shape) if dy is None else dy.contiguous()
    dsum = dsum.contiguous() if dsum is not None and has_residual else None
    dx, dresidual, dweight = rms_backward(dy, dsum, total, weight, scale, ctx.x_dtype, has_residual)
    if has_residual:
        dresidual = (dresidual if dresidual.numel() else dx).to(ctx.residual_dtype)
    return dx, dresidual if has_residual else None, dweight, None, None


def _setup_gated(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, z, weight, _, ctx.size, _ = inputs
    ctx.save_for_backward(x, z, weight, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _gated_gradient(ctx, dy, _):  # type: ignore[no-untyped-def]
    return *gated_backward(dy.contiguous(), *ctx.saved_tensors, ctx.size, gradient=beside.gradient_of), None, None, None


rms_forward.register_autograd(_rms_gradient, setup_context=_setup_rms)
gated_forward.register_autograd(_gated_gradient, setup_context=_setup_gated)
