"""Depthwise causal convolution over time: signature, reference, choice."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from data_tools.errors import UserError
from mamba_pretrain.ops import registry
from mamba_pretrain.ops.common import document_starts


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = "silu",
    seq_idx: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """``y_t = activation(bias + sum_k weight[:, k] x_{t-w+1+k})``, summed in fp32.

    Args:
        x: (b, l, d).  weight: (d, w).  bias: (d,).  activation: "silu" or None.
        seq_idx: (b, l) int32; taps never reach across a change of it.
        initial_state: (b, w - 1, d), the inputs before position 0; they belong to the document at position 0.

    Returns:
        y (b, l, d) in ``x.dtype``; with ``return_final_state`` also the inputs that the next token of the last document would reach,
        (b, w - 1, d) in ``x.dtype``, zero where they lie before that document.
    """
    if activation not in (None, "silu"):
        raise UserError(f"causal_conv1d has no activation {activation!r}; use 'silu' or None")
    return registry.call(
        "causal_conv1d",
        x=x,
        weight=weight,
        bias=bias,
        activation=activation,
        seq_idx=seq_idx,
        initial_state=initial_state,
        return_final_state=return_final_state,
    )


@registry.register("causal_conv1d", "reference", priority=0, slow_on_cuda=True)
def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    seq_idx: Tensor | None,
    initial_state: Tensor | None,
    return_final_state: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """Shifted multiply-adds."""
    length, taps = x.shape[1], weight.shape[1]
    history = x.new_zeros(x.shape[0], taps - 1, x.shape[2]) if initial_state is None else initial_state.to(x.dtype)
    padded = torch.cat([history, x], dim=1)
    document = _document_numbers(seq_idx)
    y = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for k in range(taps):
        shifted = padded[:, k : k + length].float()
        y = y + weight[:, k].float() * _same_document(shifted, document, taps - 1 - k)
    if bias is not None:
        y = y + bias.float()
    y = (F.silu(y) if activation == "silu" else y).to(x.dtype)
    if not return_final_state:
        return y
    return y, _final_inputs(padded, document, taps - 1)


def _document_numbers(seq_idx: Tensor | None) -> Tensor | None:
    """(b, l): 0, 1, 2, ... along each row."""
    starts = document_starts(seq_idx)
    return None if starts is None else starts.cumsum(1)


def _same_document(shifted: Tensor, document: Tensor | None, reach: int) -> Tensor:
    """Zeroes inputs that lie ``reach`` steps back in another document."""
    if document is None or reach == 0:
        return shifted
    source = F.pad(document, (reach, 0))[:, : document.shape[1]]
    return shifted.masked_fill((source != document).unsqueeze(-1), 0.0)


def _final_inputs(padded: Tensor, document: Tensor | None, taps: int) -> Tensor:
    final = padded[:, padded.shape[1] - taps :]
    if document is None:
        return final.clone()
    source = F.pad(document, (taps, 0))[:, document.shape[1] :]
    return final.masked_fill((source != document[:, -1:]).unsqueeze(-1), 0.0)
