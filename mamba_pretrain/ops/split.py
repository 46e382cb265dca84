"""A tensor in parts of its last dimension, and the gradients of such parts in one buffer.

Autograd concatenates the gradients of parts: a copy of all of them. Here who computes them writes them beside each other into one buffer and
hands on views of it (``scan_autograd``); ``split`` recognises such views by where they lie (``beside``) and returns their buffer as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mamba_pretrain.ops import beside

Shape = Sequence[int]  # of two numbers: what a part's share of the last dimension becomes


def split(t: Tensor, *shapes: Shape) -> tuple[Tensor, ...]:
    """``t`` (b, l, sum of products of shapes) in parts (b, l, *shape), views of it.

    Gradients that are not neighbours in one buffer (they come from elsewhere, or are sums where a part is used twice) are concatenated.
    """
    # Compilers and functorch know views of their own; a subclass may have no memory to compare.
    plain = type(t) is not Tensor or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    if plain or not (t.requires_grad and torch.is_grad_enabled()):
        pieces = t.split_with_sizes([rows * columns for rows, columns in shapes], -1)
        return tuple(piece.unflatten(-1, shape) for piece, shape in zip(pieces, shapes, strict=True))
    found: tuple[Tensor, ...] = _apply(t, shapes)
    return found


def parts(t: Tensor, shapes: Sequence[Shape]) -> tuple[Tensor, ...]:
    """The same views, for where autograd does not look."""
    batch, length, _ = t.shape
    batch_stride, row_stride, step = t.stride()
    begin, found = t.storage_offset(), []
    for rows, columns in shapes:
        found.append(t.as_strided((batch, length, rows, columns), (batch_stride, row_stride, columns * step, step), begin))
        begin += rows * columns * step
    return tuple(found)


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor, shapes: tuple[Shape, ...]) -> tuple[Tensor, ...]:  # type: ignore[override]
        return parts(t, shapes)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        whole = _buffer(gradients)
        return torch.cat([g.flatten(2) for g in gradients], -1) if whole is None else whole, None


# What Function.apply calls after it has asked for functorch, as `split` has.
_apply: Any = super(torch.autograd.Function, _Split).apply  # type: ignore[misc]


def _buffer(gradients: Sequence[Tensor]) -> Tensor | None:
    """(b, l, all channels) of which ``gradients`` are the parts, in order; None if they are not."""
    if any(g.stride()[2:] != (g.shape[3], 1) for g in gradients):
        return None
    flat = [g.as_strided((*g.shape[:2], g.shape[2] * g.shape[3]), (*g.stride()[:2], 1), g.storage_offset()) for g in gradients]
    whole = beside.joined(flat)
    return whole[0] if len(whole) == 1 else None
