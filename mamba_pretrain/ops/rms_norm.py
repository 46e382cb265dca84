"""Root-mean-square norm (arXiv:1910.07467) with the residual addition before it, and Mamba-2's gated form: signatures, references, choice."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mamba_pretrain.ops import registry


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


def _normalise(s: Tensor, eps: float) -> Tensor:
    return s * torch.rsqrt(s.square().mean(-1, keepdim=True) + eps)


@registry.register("rms_norm", "reference", priority=0)
def reference(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> Tensor | tuple[Tensor, Tensor]:
    """fp32 arithmetic."""
    s = x.float() if residual is None else x.float() + residual.float()
    y = (_normalise(s, eps) * weight.float()).to(output_dtype(x))
    return y if residual is None else (y, s)


@registry.register("gated_rms_norm", "reference", priority=0)
def gated_reference(x: Tensor, z: Tensor, weight: Tensor, eps: float, group_size: int | None) -> Tensor:
    """fp32 arithmetic."""
    gated = x.float() * F.silu(z.float())
    groups = gated.unflatten(-1, (-1, group_size or gated.shape[-1]))
    return (_normalise(groups, eps).flatten(-2) * weight.float()).to(output_dtype(x))
