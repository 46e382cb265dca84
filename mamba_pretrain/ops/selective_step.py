"""One token of Mamba-1's selective scan with the projection of its step size, for generation: signature, reference, choice."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mamba_pretrain.ops import registry


def selective_step(
    u: Tensor,
    dt: Tensor,
    dt_weight: Tensor,
    A_log: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    dt_bias: Tensor,
    state: Tensor,
) -> Tensor:
    """``state = exp(delta A) state + delta u B``, ``y = (C state + D u) silu(z)`` with ``delta = softplus(dt dt_weight' + dt_bias)``.

    Args:
        u, z: (b, d).  dt: (b, r).  dt_weight: (d, r).  B, C: (b, n).
        A_log: (d, n), A is -exp(A_log).  D, dt_bias: (d,).  All three are used in fp32.
        state: (b, d, n), fp32 or lower; moves on in place. All arithmetic is fp32.

    Returns:
        (b, d) in ``u.dtype``. Nothing waits for the device or depends on values, so that a CUDA graph can replay it.
    """
    return registry.call("selective_step", u=u, dt=dt, dt_weight=dt_weight, A_log=A_log, B=B, C=C, D=D, z=z, dt_bias=dt_bias, state=state)


@registry.register("selective_step", "reference", priority=0)
def reference(
    u: Tensor,
    dt: Tensor,
    dt_weight: Tensor,
    A_log: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    dt_bias: Tensor,
    state: Tensor,
) -> Tensor:
    """Products with the state are sums, not einsum: autocast would turn those into bf16 matmuls."""
    x = u.float()
    delta = F.softplus(F.linear(dt, dt_weight).float() + dt_bias.float())[..., None]
    new = state.float() * torch.exp(-delta * A_log.float().exp()) + delta * x[..., None] * B.float()[:, None]
    state.copy_(new)
    y = (new * C.float()[:, None]).sum(-1) + D.float() * x
    return (y * F.silu(z.float())).to(u.dtype)
