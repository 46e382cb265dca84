"""The Triton kernel of the cross-entropy: a row's loss, and its gradient written over the logits. Offsets are 64-bit."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def softmax_gradient(
    logits_ptr, target_ptr, loss_ptr, stride, columns, valid, ignore_index,
    GRADIENT: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: one pass for the logarithm of the sum of exponentials, one that replaces the logits by softmax - onehot.

    Columns from ``valid`` on take no part and get a zero gradient; a row whose target is ``ignore_index`` gets zero loss and gradient.
    ``ALIGN`` divides ``stride`` and ``columns``: without saying so Triton would load and store number by number, not in vectors.
    """
    stride, columns = stride // ALIGN * ALIGN, columns // ALIGN * ALIGN
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride
    target = tl.load(target_ptr + row)
    counts = target != ignore_index
    # Read before the reductions below: they are barriers that keep other warps from overwriting it first.
    at_target = tl.load(logits_ptr + tl.where(counts, target, 0)).to(tl.float32)
    within = tl.arange(0, BLOCK)
    # A maximum and a sum for each place within a block: places are reduced once, at the end, not block by block.
    largest = tl.zeros((BLOCK,), tl.float32) + at_target
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, valid, BLOCK):
        column = start + within
        x = tl.load(logits_ptr + column, mask=column < columns, other=0.0).to(tl.float32)
        x = tl.where(column < valid, x, float("-inf"))
        # One exponential an element: either the sum or what is added to it is scaled.
        scale = tl.exp(-tl.abs(x - largest))
        total = tl.where(x > largest, total * scale + 1.0, total + scale)
        largest = tl.maximum(largest, x)
    top = tl.max(largest, axis=0)
    total_of_all = tl.sum(total * tl.exp(largest - top), axis=0)
    log_total = top + tl.log(total_of_all)
    tl.store(loss_ptr + row, tl.where(counts, log_total - at_target, 0.0))
    if GRADIENT:
        for start in range(0, columns, BLOCK):
            column = start + within
            mask = column < columns
            x = tl.load(logits_ptr + column, mask=mask, other=0.0).to(tl.float32)
            gradient = tl.exp(x - log_total) - tl.where(column == target, 1.0, 0.0)
            gradient = tl.where(counts & (column < valid), gradient, 0.0)
            tl.store(logits_ptr + column, gradient.to(logits_ptr.dtype.element_ty), mask=mask)
