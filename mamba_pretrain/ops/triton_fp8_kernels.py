"""Triton kernels that turn 16- and 32-bit matrices into 8-bit floating point: as they lie, transposed, or both, with one read for both.

Scales are powers of two, found from a maximum's bits by integer arithmetic: every step is exact but the rounding to 8 bits itself, maxima do
not depend on the order in which they are taken, and a value that is not finite makes its scale infinite, so that it is seen behind the matmul.
Offsets are 64-bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

TENSORWISE = tl.constexpr(0)
ROWWISE = tl.constexpr(1)
BLOCKWISE = tl.constexpr(2)


@triton.jit
def _scale(largest, SHIFT: tl.constexpr):
    """Scale and its inverse for maxima given as fp32 bits: the least power of two by which they are at most 1.75 * 2**SHIFT."""
    exponent = tl.maximum(((largest + 0x1FFFFF) >> 23) - SHIFT, 1)
    exponent = tl.where(largest < 0x7F800000, exponent, 255)
    inverse = tl.maximum(254 - exponent, 0)
    return (exponent << 23).to(tl.float32, bitcast=True), (inverse << 23).to(tl.float32, bitcast=True)


@triton.jit
def _load(x_ptr, r, c, x_stride, mask):
    """A tile, through bf16 as everywhere under autocast, in fp32."""
    x = tl.load(x_ptr + r.to(tl.int64)[:, None] * x_stride + c[None, :], mask=mask, other=0.0)
    return x.to(tl.bfloat16).to(tl.float32)


@triton.jit
def _bits(x):
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def largest(
    x_ptr, along_ptr, across_ptr, x_stride, rows, n, offset,
    SCALING: tl.constexpr, ALONG: tl.constexpr, ACROSS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One tile of a part (rows, n): raises the largest bits of the whole tensor (at ``along_ptr``), or of its rows and columns."""
    tiles = tl.cdiv(n, COLUMNS)
    r = tl.program_id(0) // tiles * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(0) % tiles * COLUMNS + tl.arange(0, COLUMNS)
    bits = _bits(_load(x_ptr, r, c, x_stride, (r < rows)[:, None] & (c < n)[None, :]))
    if SCALING == TENSORWISE:
        tl.atomic_max(along_ptr, tl.max(tl.max(bits, 1), 0), sem="relaxed")
    else:
        if ALONG:
            tl.atomic_max(along_ptr + r, tl.max(bits, 1), mask=r < rows, sem="relaxed")
        if ACROSS:
            tl.atomic_max(across_ptr + offset + c, tl.max(bits, 0), mask=c < n, sem="relaxed")


@triton.jit
def cast(
    x_ptr, along_ptr, along_scale_ptr, across_ptr, across_scale_ptr, largest_along_ptr, largest_across_ptr, x_stride, rows, n, total, offset,
    SCALING: tl.constexpr, SHIFT: tl.constexpr, ALONG: tl.constexpr, ACROSS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One tile of a part (rows, n), whose columns are those from ``offset`` on of ``total`` in the result.

    along (rows, total) and across (total, rows); scales of blocks are stored column by column of (rows, blocks). A tile of blockwise scaling
    is one block in either direction.
    """
    # What the pass before this one read last is still in the cache, so it comes first.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    tiles = tl.cdiv(n, COLUMNS)
    i, j = tile // tiles, tile % tiles
    r, c = i * ROWS + tl.arange(0, ROWS), j * COLUMNS + tl.arange(0, COLUMNS)
    mask = (r < rows)[:, None] & (c < n)[None, :]
    x = _load(x_ptr, r, c, x_stride, mask)
    if SCALING == TENSORWISE:
        scale, inverse = _scale(tl.load(largest_along_ptr), SHIFT)
        x *= inverse
        if tile + offset == 0:
            if ALONG:
                tl.store(along_scale_ptr, scale)
            if ACROSS:
                tl.store(across_scale_ptr, scale)
    if ALONG:
        y = x
        if SCALING == ROWWISE:
            scale, inverse = _scale(tl.load(largest_along_ptr + r, mask=r < rows, other=0), SHIFT)
            y = x * inverse[:, None]
            if offset + j == 0:
                tl.store(along_scale_ptr + r, scale, mask=r < rows)
        if SCALING == BLOCKWISE:
            scale, inverse = _scale(tl.max(_bits(x), 1), SHIFT)
            y = x * inverse[:, None]
            tl.store(along_scale_ptr + (offset // COLUMNS + j).to(tl.int64) * rows + r, scale, mask=r < rows)
        tl.store(along_ptr + r.to(tl.int64)[:, None] * total + (offset + c)[None, :], y.to(along_ptr.dtype.element_ty), mask=mask)
    if ACROSS:
        y = x
        if SCALING == ROWWISE:
            scale, inverse = _scale(tl.load(largest_across_ptr + offset + c, mask=c < n, other=0), SHIFT)
            y = x * inverse[None, :]
            if i == 0:
                tl.store(across_scale_ptr + offset + c, scale, mask=c < n)
        if SCALING == BLOCKWISE:
            scale, inverse = _scale(tl.max(_bits(x), 0), SHIFT)
            y = x * inverse[None, :]
            tl.store(across_scale_ptr + i.to(tl.int64) * total + offset + c, scale, mask=c < n)
        turned = tl.trans(y.to(across_ptr.dtype.element_ty))
        place = across_ptr + (offset + c).to(tl.int64)[:, None] * rows + r[None, :]
        tl.store(place, turned, mask=(c < n)[:, None] & (r < rows)[None, :])
