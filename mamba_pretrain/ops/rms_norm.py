"""Root-mean-square norm (arXiv:1910.07467) with the residual addition before it, and Mamba-2's gated form: signatures, references, choice."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mamba_pretrain.ops import registry
from mamba_pretrain.ops.common import row_blocks, silu_backward
from mamba_pretrain.ops.operator import operator


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """``y = s / sqrt(mean(s^2) + eps) * weight`` with ``s = x + residual``, computed in fp32.

    Args:
        x: (..., d) in the compute dtype.  weight: (d,), used in fp32.  residual: (..., d) fp32.

    Returns:
        y (..., d): under autocast in its dtype, else in ``x.dtype``. With a residual also the new residual ``s``, fp32.
    """
    return registry.call("rms_norm", x=x, weight=weight, eps=eps, residual=residual)


def gated_rms_norm(x: Tensor, z: Tensor, weight: Tensor, eps: float, group_size: int | None = None) -> Tensor:
    """``norm(x * silu(z)) * weight``, each group of ``group_size`` channels normalised by itself (arXiv:2405.21060, section 7).

    ``x``, ``z`` (..., d); ``weight`` (d,) used in fp32. Returns (..., d): under autocast in its dtype, else in ``x.dtype``.
    """
    return registry.call("gated_rms_norm", x=x, z=z, weight=weight, eps=eps, group_size=group_size)


def output_dtype(x: Tensor) -> torch.dtype:
    """What a norm of ``x`` returns: the autocast dtype where autocast is on, else that of ``x``."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


@registry.register("rms_norm", "reference", priority=0)
def reference(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> Tensor | tuple[Tensor, Tensor]:
    """fp32 arithmetic."""
    s = x.float() if residual is None else x.float() + residual.float()
    y = F.rms_norm(s, (s.shape[-1],), weight.float(), eps).to(output_dtype(x))
    return y if residual is None else (y, s)


@registry.register("gated_rms_norm", "reference", priority=0)
def gated_reference(x: Tensor, z: Tensor, weight: Tensor, eps: float, group_size: int | None) -> Tensor:
    """fp32 arithmetic, block by block of rows; the backward pass recomputes."""
    rows, size = x.shape[:-1].numel(), group_size or x.shape[-1]
    y = gated_forward(x.reshape(rows, -1), z.reshape(rows, -1), weight, eps, size, output_dtype(x))
    return y.view(x.shape)


# -- the gated norm's custom operators: opaque to torch.compile, with gradients -------------------------------------------------------------


def _gated_parts(x: Tensor, z: Tensor, eps: float, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """silu(z); x * silu(z) divided by its root mean square; and one over that: (rows, d), (rows, groups, size), (rows, groups, 1), fp32."""
    gate = F.silu(z)
    groups = (x * gate).unflatten(-1, (-1, size))
    scale = torch.linalg.vector_norm(groups, dim=-1, keepdim=True).square_().div_(size).add_(eps).rsqrt_()
    return gate, groups.mul_(scale), scale


@operator("gated_rms_norm_forward")
def gated_forward(x: Tensor, z: Tensor, weight: Tensor, eps: float, size: int, dtype: torch.dtype) -> Tensor:
    """y in ``dtype``; ``x``, ``z`` (rows, d), groups of ``size`` channels."""
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    w = weight.float()
    for rows in row_blocks(x.shape, x.device):
        normalised = _gated_parts(x[rows].float(), z[rows].float(), eps, size)[1]
        y[rows] = normalised.flatten(1).mul_(w)
    return y


@operator("gated_rms_norm_backward")
def gated_backward(dy: Tensor, x: Tensor, z: Tensor, weight: Tensor, eps: float, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, z and weight."""
    dx, dz, w = torch.empty_like(x), torch.empty_like(z), weight.float()
    dweight = torch.zeros(weight.shape, device=x.device)
    for rows in row_blocks(x.shape, x.device):
        value, raw_gate, dout = x[rows].float(), z[rows].float(), dy[rows].float()
        gate, normalised, scale = _gated_parts(value, raw_gate, eps, size)
        dweight += (dout * normalised.flatten(1)).sum(0)
        dnormalised = (dout * w).unflatten(-1, (-1, size))
        along = (dnormalised * normalised).mean(-1, keepdim=True)
        dgated = dnormalised.sub_(normalised.mul_(along)).mul_(scale).flatten(1)
        dx[rows] = dgated * gate
        dz[rows] = silu_backward(dgated.mul_(value), raw_gate)
    return dx, dz, dweight.to(weight.dtype)


@gated_forward.register_fake
def _(x, z, weight, eps, size, dtype):  # type: ignore[no-untyped-def]
    return torch.empty_like(x, dtype=dtype)


@gated_backward.register_fake
def _(dy, x, z, weight, eps, size):  # type: ignore[no-untyped-def]
    return torch.empty_like(x), torch.empty_like(z), torch.empty_like(weight)


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, z, weight, ctx.eps, ctx.size, _ = inputs
    ctx.save_for_backward(x, z, weight)


def _gradients(ctx, dy):  # type: ignore[no-untyped-def]
    return *gated_backward(dy, *ctx.saved_tensors, ctx.eps, ctx.size), None, None, None


gated_forward.register_autograd(_gradients, setup_context=_setup_context)
