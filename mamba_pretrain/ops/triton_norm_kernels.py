"""Triton kernels of the norms. A program holds whole rows (or groups of a row) in registers; offsets are 64-bit.

Backward programs walk over rows, ROWS at a time, and sum their part of the weight's gradient; the parts are added afterwards in a fixed order, so
the result does not depend on scheduling. With STAGES above 1 the loads of that many steps less one are on their way ahead; Triton starts a step's at
the end of an earlier one, so that with 2 they overlap no arithmetic of their own program.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rms_forward(
    x_ptr, residual_ptr, weight_ptr, y_ptr, sum_ptr, scale_ptr, x_stride, residual_stride, n, eps,
    HAS_RESIDUAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: s = x + residual (stored if there is a residual), y = s * scale * weight with scale = 1 / rms(s) (stored)."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < n
    s = tl.load(x_ptr + row * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        s += tl.load(residual_ptr + row * residual_stride + columns, mask=mask, other=0.0).to(tl.float32)
        tl.store(sum_ptr + row * n + columns, s, mask=mask)
    scale = 1.0 / tl.sqrt(tl.sum(s * s, axis=0) / n + eps)
    tl.store(scale_ptr + row, scale)
    weight = tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * n + columns, (s * scale * weight).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def rms_backward(
    dy_ptr, dsum_ptr, sum_ptr, weight_ptr, scale_ptr, dx_ptr, dresidual_ptr, dweight_ptr, sum_stride, rows, n,
    HAS_DSUM: tl.constexpr, STORE_DRESIDUAL: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Every num_programs-th block of ROWS rows: gradients of s in the dtypes of x and of the residual, and this program's part of dweight."""
    columns = tl.arange(0, BLOCK)[None, :]
    inside = columns < n
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    dweight = tl.zeros((1, BLOCK), dtype=tl.float32)
    for first in tl.range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS, num_stages=STAGES):
        row = (first + tl.arange(0, ROWS)[:, None]).to(tl.int64)
        mask = (row < rows) & inside
        total = tl.load(sum_ptr + row * sum_stride + columns, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + row * n + columns, mask=mask, other=0.0).to(tl.float32)
        if HAS_DSUM:
            dsum = tl.load(dsum_ptr + row * n + columns, mask=mask, other=0.0).to(tl.float32)
        scale = tl.load(scale_ptr + row, mask=row < rows, other=0.0)
        normalised = total * scale
        dweight += tl.sum(dy * normalised, axis=0, keep_dims=True)
        dnormalised = dy * weight
        along = tl.sum(dnormalised * normalised, axis=1, keep_dims=True) / n
        ds = (dnormalised - normalised * along) * scale
        if HAS_DSUM:
            ds += dsum
        tl.store(dx_ptr + row * n + columns, ds.to(dx_ptr.dtype.element_ty), mask=mask)
        if STORE_DRESIDUAL:
            tl.store(dresidual_ptr + row * n + columns, ds.to(dresidual_ptr.dtype.element_ty), mask=mask)
    tl.store(dweight_ptr + tl.program_id(0) * n + columns, dweight, mask=inside)


@triton.jit
def _sigmoid(z):
    """By two instructions of the special function unit, without the care that a division takes of tiny and huge divisors: 1 + exp(-z) is at least
    1, and where it overflows the square of 0 is right."""
    root = tl.rsqrt(1.0 + tl.exp2(z * -1.4426950408889634))
    return root * root


@triton.jit
def gated_forward(
    x_ptr, z_ptr, weight_ptr, y_ptr, scale_ptr, x_stride, z_stride, rows, n, size, eps,
    ROWS: tl.constexpr, STAGES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One group of every num_programs-th block of ROWS rows: s = x * silu(z), y = s * scale * weight with scale = 1 / rms(s) (stored)."""
    group = tl.program_id(1)
    within = tl.arange(0, BLOCK)[None, :]
    inside = within < size
    columns = group * size + within
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    for first in tl.range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS, num_stages=STAGES):
        row = (first + tl.arange(0, ROWS)[:, None]).to(tl.int64)
        mask = inside if ROWS == 1 else (row < rows) & inside
        x = tl.load(x_ptr + row * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
        z = tl.load(z_ptr + row * z_stride + columns, mask=mask, other=0.0).to(tl.float32)
        s = x * (z * _sigmoid(z))
        scale = tl.rsqrt(tl.sum(s * s, axis=1, keep_dims=True) / size + eps)
        tl.store(scale_ptr + row * tl.num_programs(1) + group, scale, mask=row < rows)
        tl.store(y_ptr + row * n + columns, (s * scale * weight).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def gated_backward(
    dy_ptr, x_ptr, z_ptr, weight_ptr, scale_ptr, dx_ptr, dz_ptr, dweight_ptr, x_stride, z_stride, dz_stride, rows, n, size,
    ROWS: tl.constexpr, STAGES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One group of every num_programs-th block of ROWS rows: gradients of x and z (rows dz_stride apart), and this program's part of dweight.

    What is written before the sum along the row is all that lives through it, 4 registers a channel besides those of weight and dweight. A mask
    that depends on the row, which a single row does not need, would cost predicates and spill.
    """
    group = tl.program_id(1)
    within = tl.arange(0, BLOCK)[None, :]
    inside = within < size
    columns = group * size + within
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    dweight = tl.zeros((1, BLOCK), dtype=tl.float32)
    for first in tl.range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS, num_stages=STAGES):
        row = (first + tl.arange(0, ROWS)[:, None]).to(tl.int64)
        mask = inside if ROWS == 1 else (row < rows) & inside
        x = tl.load(x_ptr + row * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
        z = tl.load(z_ptr + row * z_stride + columns, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + row * n + columns, mask=mask, other=0.0).to(tl.float32)
        scale = tl.load(scale_ptr + row * tl.num_programs(1) + group, mask=row < rows, other=0.0)
        open_ = _sigmoid(z)
        gate = z * open_
        slope = x * (open_ + gate * (1.0 - open_))
        s = x * gate
        dweight += tl.sum(dy * s * scale, axis=0, keep_dims=True)
        dnormalised = dy * weight
        along = tl.sum(dnormalised * s, axis=1, keep_dims=True) * (scale * scale / size)
        ds = (dnormalised - s * along) * scale
        tl.store(dx_ptr + row * n + columns, (ds * gate).to(dx_ptr.dtype.element_ty), mask=mask)
        tl.store(dz_ptr + row * dz_stride + columns, (ds * slope).to(dz_ptr.dtype.element_ty), mask=mask)
    tl.store(dweight_ptr + tl.program_id(0) * n + columns, dweight, mask=inside)


@triton.jit
def sum_parts(parts_ptr, sum_ptr, parts, n, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """COLUMNS of the sum over all parts (parts, n), fp32: ROWS of them at once, whose sums are added at the end."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = columns < n
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for first in tl.range(0, parts, ROWS):
        part = first + tl.arange(0, ROWS)[:, None]
        total += tl.load(parts_ptr + part.to(tl.int64) * n + columns, mask=(part < parts) & inside, other=0.0)
    tl.store(sum_ptr + columns, tl.sum(total, axis=0, keep_dims=True).to(sum_ptr.dtype.element_ty), mask=inside)
