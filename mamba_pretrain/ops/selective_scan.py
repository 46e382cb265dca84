"""Mamba-1's selective scan (arXiv:2312.00752, section 3): signature, reference, choice.

state_t = exp(delta_t A) state_{t-1} + delta_t u_t B_t        y_t = C_t state_t + D u_t, gated by silu(z_t)
"""

from __future__ import annotations

from torch import Tensor

from mamba_pretrain.ops import registry, selective_scan_reference
from mamba_pretrain.ops.common import document_starts


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Selective scan with softplus(delta + delta_bias) inside.

    Args:
        u, delta, z: (b, l, d); ``z`` gates the output by silu(z).
        A: (d, n) fp32, negative (already -exp(A_log)).  B, C: (b, l, n).  D, delta_bias: (d,) fp32.
        seq_idx: (b, l) int32; the state restarts from zero where it changes along the length.
        initial_state: (b, d, n) fp32, flows into the document at position 0.

    Returns:
        y (b, l, d) in ``u.dtype``; with ``return_final_state`` also the state after the last token, (b, d, n) fp32. Both carry gradients.
    """
    return registry.call(
        "selective_scan",
        u=u,
        delta=delta,
        A=A,
        B=B,
        C=C,
        D=D,
        z=z,
        delta_bias=delta_bias,
        seq_idx=seq_idx,
        initial_state=initial_state,
        return_final_state=return_final_state,
    )


@registry.register("selective_scan", "reference", priority=0, slow_on_cuda=True)
def reference(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_state: Tensor | None,
    return_final_state: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """Pure PyTorch; see ``selective_scan_reference``."""
    y, final, _ = selective_scan_reference.forward(u, delta, A, B, C, D, z, delta_bias, document_starts(seq_idx), initial_state)
    return (y, final) if return_final_state else y
