"""One token of each recurrence, for generation.

Plain tensor arithmetic without a loop, a data-dependent shape or a read by the host: cheap on a CPU, and a CUDA graph can capture it.
States are updated in place. Products with the state are sums, not einsum: autocast would turn those into bf16 matmuls.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def conv_step(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor) -> Tensor:
    """silu(causal convolution) of one token: ``x`` (b, 1, d), ``weight`` (d, w), ``state`` (b, w - 1, d) of the inputs before it."""
    window = torch.cat([state.to(x.dtype), x], dim=1)
    y = (window.float() * weight.float().t()).sum(1, keepdim=True)
    if bias is not None:
        y = y + bias.float()
    state.copy_(window[:, 1:])
    return F.silu(y).to(x.dtype)


def selective_step(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, dt_bias: Tensor, state: Tensor) -> Tensor:
    """Mamba-1's recurrence for one token: ``u, dt, z`` (b, 1, d), ``A`` (d, n), ``B, C`` (b, 1, n), ``state`` (b, d, n) fp32."""
    x = u[:, 0].float()
    delta = F.softplus(dt[:, 0].float() + dt_bias)
    state.copy_(state * torch.exp(delta[..., None] * A) + (delta * x)[..., None] * B.float())
    y = (state * C.float()).sum(-1) + D * x
    return (y * F.silu(z[:, 0].float())).to(u.dtype).unsqueeze(1)


def ssd_step(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor, dt_limit: tuple[float, float], state: Tensor
) -> Tensor:
    """Mamba-2's recurrence for one token.

    ``x`` (b, 1, h, p), ``dt`` (b, 1, h), ``A`` (h,), ``B, C`` (b, 1, g, n), ``state`` (b, h, p, n) fp32.
    """
    b, _, h, p = x.shape
    groups = B.shape[2]
    value = x[:, 0].float()
    delta = F.softplus(dt[:, 0].float() + dt_bias).clamp(*dt_limit)
    decay = torch.exp(delta * A)[..., None, None]
    heads_b, heads_c = (t[:, 0].float().repeat_interleave(h // groups, dim=1) for t in (B, C))
    state.copy_(state * decay + (delta[..., None] * value)[..., None] * heads_b[:, :, None, :])
    y = (state * heads_c[:, :, None, :]).sum(-1) + D[:, None] * value
    return y.to(x.dtype).reshape(b, 1, h, p)
