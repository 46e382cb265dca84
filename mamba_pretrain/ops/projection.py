"""Linear maps whose backward pass makes no extra pass over memory.

The forward pass is torch.nn.Linear's, autocast included. What autograd would add behind its matmuls is left out of the backward pass:

- an output that is used in parts (Mamba-1's u and z) has its gradient in parts too. Autograd concatenates them first; here parts that lie beside
  each other in memory already (``ops/beside.py``) are taken as one, and of others each part's matmuls take it as it is and sum the parts' shares
  of the input's gradient themselves;
- an input that is used beside the projection (Mamba-1's u, which the scan takes as well) gets two gradients. Autograd adds them afterwards;
  here the matmul adds the second to the first, in place;
- a weight's gradient is written in the weight's dtype at once, on CUDA; autograd writes it in autocast's and casts it.

With an FP8 recipe the three matmuls run in 8 bits (``ops/fp8.py``). Parts of a gradient are then cast into one matrix, and one matmul each takes
it. Without a backward pass (evaluation, generation) nothing does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mamba_pretrain.ops import beside, fp8, weight_copy
from mamba_pretrain.ops.matmul import add_matmul, matmul


def project(x: Tensor, weight: Tensor, bias: Tensor | None = None, recipe: fp8.Recipe | None = None) -> Tensor:
    """``x @ weight.T + bias`` (..., out) of x (..., in), weight (out, in), bias (out,); in FP8 where there is a ``recipe``."""
    return _project(x, weight, bias, (weight.shape[0],), beside=False, recipe=recipe)[0]


def project_parts(
    x: Tensor, weight: Tensor, bias: Tensor | None, widths: Sequence[int], recipe: fp8.Recipe | None = None
) -> tuple[Tensor, ...]:
    """The same cut into parts (..., width), views of one result. Raises ValueError unless ``widths`` add up to the number of outputs."""
    if sum(widths) != weight.shape[0]:
        raise ValueError(f"parts of widths {tuple(widths)} do not add up to the {weight.shape[0]} outputs of the weight")
    return _project(x, weight, bias, tuple(widths), beside=False, recipe=recipe)


def project_beside(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``x`` itself for another use, and its projection (..., out).

    The gradient that comes back for the returned x is overwritten with the sum. Its one user must therefore make that gradient anew, as every
    implementation of an op here does; an addition does not: it hands the same tensor to both of its operands.
    """
    kept, projected = _project(x, weight, bias, (weight.shape[0],), beside=True)
    return kept, projected


def _project(
    x: Tensor, weight: Tensor, bias: Tensor | None, widths: tuple[int, ...], beside: bool, recipe: fp8.Recipe | None = None
) -> tuple[Tensor, ...]:
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)):
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        return _Projection.apply(x, weight, bias, dtype, widths, beside, recipe)
    # Without a backward pass autocast does the casts: it casts a weight once for all the tokens of a generated text.
    y = F.linear(x, weight, bias)
    parts = (y,) if len(widths) == 1 else y.split_with_sizes(widths, dim=-1)
    return (x, *parts) if beside else parts


_alias = torch.ops.aten._unsafe_view.default  # the same memory in another shape


# Every call counts here: a small model's kernels are shorter than what it takes to launch them.
class _Projection(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype | None,
        widths: tuple[int, ...],
        beside: bool,
        recipe: fp8.Recipe | None,
    ) -> tuple[Tensor, ...]:
        shape = x.shape
        rows, w, b = x.view(-1, shape[-1]) if x.is_contiguous() else x.reshape(-1, shape[-1]), weight, bias
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        if recipe is not None:
            y, saved = fp8.product(rows, w, dtype or x.dtype, recipe, (needs_x, needs_weight))
            if b is not None:
                y += b
            ctx.save_for_backward(*saved)
        else:
            # Without autocast nothing is cast, so that operands of different dtypes are the same error as in torch.nn.Linear.
            if dtype is not None:
                rows, w, b = rows.to(dtype), weight_copy.cast(w, dtype), None if b is None else b.to(dtype)
            y = torch.mm(rows, w.t()) if b is None else torch.addmm(b, rows, w.t())
            # A weight that needs no cast is saved as the parameter it is: an engine that frees and gathers its storage finds it again.
            ctx.save_for_backward(rows if needs_weight else None, w if needs_x else None)
        ctx.set_materialize_grads(False)
        ctx.widths, ctx.beside, ctx.shape, ctx.device, ctx.recipe = widths, beside, shape, x.device.type, recipe
        ctx.dtypes = x.dtype, weight.dtype, None if bias is None else bias.dtype
        # Not views in autograd's books, as a matmul's own result is none: FSDP2 warns of modules that return views.
        y = _alias(y, (*shape[:-1], y.shape[1]))
        parts = (y,) if len(widths) == 1 else torch.unsafe_split_with_sizes(y, widths, dim=-1)
        return (_alias(x, shape), *parts) if beside else tuple(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_autocast_enabled(ctx.device):
            with torch.autocast(ctx.device, enabled=False):
                return _gradients(ctx, gradients)
        return _gradients(ctx, gradients)


def _gradients(ctx: Any, gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    of_kept, of_parts = (gradients[0], gradients[1:]) if ctx.beside else (None, gradients)
    parts, widths = _joined(of_parts, ctx.widths)
    x_dtype, weight_dtype, bias_dtype = ctx.dtypes
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    if ctx.recipe is not None:
        dx, dweight = fp8.gradients(parts, widths, ctx.saved_tensors, (x_dtype, weight_dtype), ctx.recipe)
    else:
        x, weight = ctx.saved_tensors
        dx = _input_gradient(parts, widths, weight, of_kept, x_dtype) if needs_x else None
        dweight = _weight_gradient(parts, widths, x, weight_dtype) if needs_weight else None
    dbias = _bias_gradient(parts, widths, bias_dtype) if needs_bias else None
    return None if dx is None else dx.view(ctx.shape), dweight, dbias, None, None, None, None


def _joined(gradients: Sequence[Tensor | None], widths: tuple[int, ...]) -> tuple[list[Tensor | None], tuple[int, ...]]:
    """Gradients of the parts as (rows, width), neighbours in memory as one, and their widths."""
    if len(widths) > 1 and not any(g is None for g in gradients):
        gradients = beside.joined(gradients)
        widths = tuple(g.shape[-1] for g in gradients if g is not None)
    return [None if g is None else g.reshape(-1, width) for g, width in zip(gradients, widths, strict=True)], widths


def _input_gradient(
    parts: list[Tensor | None], widths: tuple[int, ...], weight: Tensor, of_kept: Tensor | None, dtype: torch.dtype
) -> Tensor | None:
    """(rows, in) of ``parts`` (rows, width) and, where the input is used beside, that use's gradient (..., in), which is overwritten."""
    total = None if of_kept is None else of_kept.contiguous().view(-1, weight.shape[1])
    weights = (weight,) if len(parts) == 1 else weight.split_with_sizes(widths)
    shares = [(g, w) for g, w in zip(parts, weights, strict=True) if g is not None]
    # The widest part writes the result, the others add to it.
    for g, w in sorted(shares, key=lambda share: -share[1].shape[0]):
        total = matmul(g, w, dtype) if total is None else add_matmul(total, g, w)
    return total


def _weight_gradient(parts: list[Tensor | None], widths: tuple[int, ...], x: Tensor, dtype: torch.dtype) -> Tensor | None:
    """(out, in) of ``parts`` (rows, width) and ``x`` (rows, in)."""
    if len(parts) == 1:
        return None if parts[0] is None else matmul(parts[0].t(), x, dtype)
    total = x.new_empty(sum(widths), x.shape[1], dtype=dtype)
    for g, share in zip(parts, total.split_with_sizes(widths), strict=True):
        if g is None:
            share.zero_()
        else:
            matmul(g.t(), x, dtype, out=share)
    return total


def _bias_gradient(parts: list[Tensor | None], widths: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
    """(out,) of ``parts`` (rows, width)."""
    shares = [None if g is None else g.sum(0, dtype=dtype) for g in parts]
    present = next((share for share in shares if share is not None), None)
    if present is None or len(parts) == 1:
        return present
    return torch.cat([present.new_zeros(n) if share is None else share for share, n in zip(shares, widths, strict=True)])
