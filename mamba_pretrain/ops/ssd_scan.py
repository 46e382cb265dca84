"""Mamba-2's scan (state-space duality, arXiv:2405.21060): signature, reference, choice."""

from __future__ import annotations

from torch import Tensor

from data_tools.errors import UserError
from mamba_pretrain.ops import registry, ssd_scan_reference
from mamba_pretrain.ops.common import document_starts


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    chunk_size: int = 256,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
) -> Tensor | tuple[Tensor, Tensor]:
    """``state_t = exp(dt_t A) state_{t-1} + dt_t x_t B_t``, ``y_t = C_t state_t + D x_t``, gated by silu(z_t) if z is given.

    ``dt`` becomes ``clamp(softplus(dt + dt_bias), *dt_limit)`` inside.

    Args:
        x, z: (b, l, h, p).  dt: (b, l, h).  A: (h,) fp32, negative.  B, C: (b, l, g, n); h is a multiple of g.  D, dt_bias: (h,) fp32.
        seq_idx: (b, l) int32; the state restarts from zero where it changes along the length.
        initial_state: (b, h, p, n) fp32, flows into the document at position 0.
        chunk_size: time steps that kernels handle by matmuls at once; changes speed, not the result.

    Returns:
        y (b, l, h, p) in ``x.dtype``; with ``return_final_state`` also the state after the last token, (b, h, p, n) fp32.
    """
    if x.shape[2] % B.shape[2]:
        raise UserError(f"ssd_scan needs heads in multiples of groups, not {x.shape[2]} heads and {B.shape[2]} groups; change ngroups")
    return registry.call(
        "ssd_scan",
        x=x,
        dt=dt,
        A=A,
        B=B,
        C=C,
        D=D,
        z=z,
        dt_bias=dt_bias,
        seq_idx=seq_idx,
        initial_state=initial_state,
        return_final_state=return_final_state,
        chunk_size=chunk_size,
        dt_limit=dt_limit,
    )


@registry.register("ssd_scan", "reference", priority=0, slow_on_cuda=True)
def reference(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_state: Tensor | None,
    return_final_state: bool,
    chunk_size: int,
    dt_limit: tuple[float, float],
) -> Tensor | tuple[Tensor, Tensor]:
    """Pure PyTorch; see ``ssd_scan_reference``."""
    y, final, _ = ssd_scan_reference.forward(x, dt, A, B, C, D, z, dt_bias, document_starts(seq_idx), initial_state, chunk_size, *dt_limit)
    return (y, final) if return_final_state else y
