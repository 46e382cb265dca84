"""Gradients of a projection's parts beside each other in one buffer, as the parts lie in the projection's output.

A projection whose output is used in parts (Mamba-1's u and z, Mamba-2's z, xBC and dt) gets their gradients from different operations: of u from
the convolution, of z from the scan's gate. Where these write into one buffer, its backward pass needs one matmul for each gradient instead of one
a part, and reads and writes the input's gradient once: ``gradient_of`` makes room beside, ``joined`` recognises what lies so.

The operations know nothing of each other. What brings them together is that they kept views of one output for their backward passes: its storage
names the buffer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

# By the output's storage: the buffer that still waits for gradients of other parts, and columns that are taken. A reference that has expired equals
# no other, even if the memory is used again. A buffer leaves when all of it is taken, which is soon, within a layer's backward pass; one whose other
# parts' gradients come from elsewhere leaves when the projection's backward pass asks for neighbours, or the next buffer is made.
_waiting: dict[StorageWeakRef, tuple[Tensor, list[range]]] = {}


def alone(part: Tensor) -> Tensor:
    """Uninitialised memory for the gradient of ``part``, contiguous: what an operator makes whose results are known by their shapes."""
    return part.new_empty(part.shape)


def gradient_of(part: Tensor) -> Tensor:
    """Uninitialised memory for the gradient of ``part`` (b, l, d): beside those of the other parts of the same output (b, l, columns), where
    ``part`` is a part of one; else contiguous. Channels are adjacent either way."""
    columns = _columns(part)
    if columns is None:
        return alone(part)
    whole = part.shape[0], part.shape[1], part.stride(1)
    output = StorageWeakRef(part.untyped_storage())
    buffer, taken = _waiting.pop(output, (None, []))
    if buffer is None or buffer.shape != whole or any(columns.start < other.stop and other.start < columns.stop for other in taken):
        _forget_expired()
        buffer, taken = part.new_empty(whole), []
    taken.append(columns)
    if sum(map(len, taken)) < whole[2]:
        _waiting[output] = buffer, taken
    return buffer[:, :, columns.start : columns.stop]


def _forget_expired() -> None:
    for output in [waiting for waiting in _waiting if waiting.expired()]:
        del _waiting[output]


def _columns(part: Tensor) -> range | None:
    """Where ``part`` (b, l, d) lies in the rows of an output that fills its storage; None if it is no part of such."""
    if part.dim() != 3 or 0 in part.shape:
        return None
    batch, length, width = part.shape
    batch_stride, row, step = part.stride()
    begin = part.storage_offset()
    fills = step == 1 and batch_stride == length * row and batch * batch_stride * part.element_size() == part.untyped_storage().nbytes()
    return range(begin, begin + width) if fills and width < row and begin + width <= row else None


def joined(gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Gradients (..., width) of neighbouring parts, in order, with those that lie beside each other in one buffer replaced by what they are
    together. As they are while autograd watches, since a second derivative would see the first of them alone, and where a compiler does."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return list(gradients)
    _forget_expired()
    found: list[Tensor | None] = []
    for gradient in gradients:
        last = found[-1] if found else None
        if gradient is not None and last is not None and _beside(last, gradient):
            shape = *last.shape[:-1], last.shape[-1] + gradient.shape[-1]
            found[-1] = last.as_strided(shape, last.stride(), last.storage_offset())
        else:
            found.append(gradient)
    return found


def _beside(left: Tensor, right: Tensor) -> bool:
    """Whether every row of ``right`` begins in memory where that of ``left`` ends."""
    return (
        type(left) is type(right) is Tensor
        and left.dtype == right.dtype
        and left.shape[:-1] == right.shape[:-1]
        and left.stride() == right.stride()
        and left.stride(-1) == 1
        and left.storage_offset() + left.shape[-1] == right.storage_offset()
        and not (left.is_neg() or right.is_neg())
        and torch._C._is_alias_of(left, right)  # type: ignore[attr-defined]
    )
