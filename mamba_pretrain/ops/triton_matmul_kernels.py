"""The Triton kernel that adds a matmul over few inner numbers to what is there: its time is that of reading and writing the sum."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _left(a_ptr, r, rows, stride, k, FIRST: tl.constexpr, INNER: tl.constexpr):
    """Inner numbers of rows of a from FIRST on, zeros beyond the ``k`` there are."""
    i = FIRST + tl.arange(0, INNER)
    return tl.load(a_ptr + r.to(tl.int64)[:, None] * stride + i[None, :], mask=(r < rows)[:, None] & (i < k)[None, :], other=0.0)


@triton.jit
def _right(b_ptr, c, columns, stride, k, FIRST: tl.constexpr, INNER: tl.constexpr):
    """The same of columns of b."""
    i = FIRST + tl.arange(0, INNER)
    return tl.load(b_ptr + i.to(tl.int64)[:, None] * stride + c[None, :], mask=(i < k)[:, None] & (c < columns)[None, :], other=0.0)


@triton.jit
def add_product(
    total_ptr, a_ptr, b_ptr, rows, columns, k, total_stride, a_stride, b_stride,
    FIRST: tl.constexpr, REST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """total (rows, columns) += a (rows, k) @ b (k, columns), summed in fp32 and rounded once. ``k`` is at most FIRST + REST; REST may be 0.

    A program keeps its columns of b and walks down the rows; what the next rows need is on its way during this tile's sums and stores.
    """
    blocks = tl.cdiv(columns, COLUMNS)
    c = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    b = _right(b_ptr, c, columns, b_stride, k, 0, FIRST)
    if REST:
        b_rest = _right(b_ptr, c, columns, b_stride, k, FIRST, REST)
    walkers = tl.num_programs(0) // blocks
    for start in tl.range(tl.program_id(0) // blocks * ROWS, rows, walkers * ROWS, num_stages=STAGES):
        r = start + tl.arange(0, ROWS)
        place = total_ptr + r.to(tl.int64)[:, None] * total_stride + c[None, :]
        mask = (r < rows)[:, None] & (c < columns)[None, :]
        total = tl.load(place, mask=mask, other=0.0)
        product = tl.dot(_left(a_ptr, r, rows, a_stride, k, 0, FIRST), b)
        if REST:
            product = tl.dot(_left(a_ptr, r, rows, a_stride, k, FIRST, REST), b_rest, product)
        tl.store(place, (total.to(tl.float32) + product).to(total_ptr.dtype.element_ty), mask=mask)
