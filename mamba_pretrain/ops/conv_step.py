"""One token of the causal convolution, for generation: signature, reference, choice."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mamba_pretrain.ops import registry


def conv_step(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor) -> Tensor:
    """``silu(bias + sum_k weight[:, k] window_k)`` where the window is ``state`` and then ``x``, summed in fp32; the state moves on in place.

    Args:
        x: (b, d), this token.  weight: (d, w).  bias: (d,).  state: (b, w - 1, d), the inputs before it.

    Returns:
        (b, d) in ``x.dtype``. Nothing waits for the device or depends on values, so that a CUDA graph can replay it.
    """
    return registry.call("conv_step", x=x, weight=weight, bias=bias, state=state)


@registry.register("conv_step", "reference", priority=0)
def reference(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor) -> Tensor:
    """fp32 arithmetic."""
    window = torch.cat([state.to(x.dtype), x.unsqueeze(1)], dim=1)
    y = (window.float() * weight.float().t()).sum(1)
    if bias is not None:
        y = y + bias.float()
    state.copy_(window[:, 1:])
    return F.silu(y).to(x.dtype)
