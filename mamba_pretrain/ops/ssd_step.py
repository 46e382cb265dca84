"""One token of Mamba-2's scan, for generation: signature, reference, choice."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mamba_pretrain.ops import registry


def ssd_step(
    x: Tensor,
    dt: Tensor,
    A_log: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
) -> Tensor:
    """``state = exp(dt A) state + dt x B``, ``y = C state + D x``, where ``dt`` becomes ``clamp(softplus(dt + dt_bias), *dt_limit)``.

    Args:
        x: (b, h, p).  dt: (b, h).  B, C: (b, g, n); h is a multiple of g.
        A_log: (h,), A is -exp(A_log).  D, dt_bias: (h,).  All three are used in fp32.
        state: (b, h, p, n), fp32 or lower; moves on in place. All arithmetic is fp32.

    Returns:
        (b, h, p) in ``x.dtype``. Nothing waits for the device or depends on values, so that a CUDA graph can replay it.
    """
    return registry.call("ssd_step", x=x, dt=dt, A_log=A_log, B=B, C=C, D=D, dt_bias=dt_bias, state=state, dt_limit=dt_limit)


@registry.register("ssd_step", "reference", priority=0)
def reference(
    x: Tensor,
    dt: Tensor,
    A_log: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    dt_limit: tuple[float, float],
) -> Tensor:
    """Products with the state are sums, not einsum: autocast would turn those into bf16 matmuls."""
    value, per_group = x.float(), x.shape[1] // B.shape[1]
    delta = F.softplus(dt.float() + dt_bias.float()).clamp(*dt_limit)
    decay = torch.exp(-delta * A_log.float().exp())[..., None, None]
    heads_b, heads_c = (t.float().repeat_interleave(per_group, dim=1)[:, :, None] for t in (B, C))
    new = state.float() * decay + (delta[..., None] * value)[..., None] * heads_b
    state.copy_(new)
    y = (new * heads_c).sum(-1) + D.float()[:, None] * value
    return y.to(x.dtype)
