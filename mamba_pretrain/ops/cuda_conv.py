"""The causal convolution by kernels of our own: channel-last, strided, deterministic, with document boundaries.

They make a Mamba-1 run independent of compiled packages, and on an H100 they are faster than causal-conv1d's (docs/kernels.md).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mamba_pretrain.ops import beside, nvrtc, registry
from mamba_pretrain.ops import cuda_conv_kernels as kernels
from mamba_pretrain.ops.causal_conv1d import final_inputs, inputs_before
from mamba_pretrain.ops.common import document_numbers
from mamba_pretrain.ops.kernel_arguments import on_device_of
from mamba_pretrain.ops.operator import operator


def unsupported(request: registry.Request) -> str | None:
    """Why these kernels cannot serve."""
    if request.device != "cuda":
        return f"it needs a CUDA device, not {request.device}"
    x, taps = request["x"], request["weight"].shape[1]
    if not 1 <= taps <= kernels.MAX_TAPS:
        return f"it has 1 to {kernels.MAX_TAPS} taps, not {taps}"
    if x.dtype not in kernels.SCALAR_TYPES:
        return f"it computes in fp32, fp16 or bf16, not {x.dtype}"
    if x.numel() == 0 or x.shape[0] > 65535 or x.shape[1] > kernels.MAX_LENGTH:
        return f"it takes 1 to 65535 rows of 1 to {kernels.MAX_LENGTH} steps, not {tuple(x.shape)}"
    return nvrtc.unsupported(x.device)


@registry.register("causal_conv1d", "cuda", priority=30, unsupported=unsupported)
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    seq_idx: Tensor | None,
    initial_state: Tensor | None,
    return_final_state: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """Weight and bias are used in fp32, whatever they are stored in."""
    history = None if initial_state is None else initial_state.to(x.dtype)
    seq_idx = None if seq_idx is None else seq_idx.to(torch.int32)
    y = forward(x, weight.float(), None if bias is None else bias.float(), seq_idx, history, activation == "silu")
    if not return_final_state:
        return y
    return y, final_inputs(x, inputs_before(x, weight, history), document_numbers(seq_idx))


def _plain(x: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """x with adjacent channels, the others contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous(), *(None if t is None else t.contiguous() for t in others)


@operator(
    "cuda_conv1d_forward",
    device_types="cuda",
    schema="(Tensor x, Tensor weight, Tensor? bias, Tensor? seq_idx, Tensor? history, bool silu) -> Tensor",
)
def forward(x, weight, bias, seq_idx, history, silu):  # type: ignore[no-untyped-def]
    """See ``cuda_conv_kernels.forward``."""
    with on_device_of(x):
        x, weight, bias, seq_idx, history = _plain(x, weight, bias, seq_idx, history)
        return kernels.forward(kernels.Operands(x, weight, bias, seq_idx, history, silu))


@operator(
    "cuda_conv1d_backward",
    device_types="cuda",
    schema="(Tensor dy, Tensor x, Tensor weight, Tensor? bias, Tensor? seq_idx, Tensor? history, bool silu) -> (Tensor, Tensor, Tensor, Tensor)",
)
def backward(dy, x, weight, bias, seq_idx, history, silu, gradient=beside.alone):  # type: ignore[no-untyped-def]
    """See ``cuda_conv_kernels.backward``. ``gradient``: where that of x goes."""
    with on_device_of(x):
        dy = dy if dy.stride(-1) == 1 else dy.contiguous()
        x, weight, bias, seq_idx, history = _plain(x, weight, bias, seq_idx, history)
        return kernels.backward(kernels.Operands(x, weight, bias, seq_idx, history, silu), dy, gradient(x))


@forward.register_fake
def _(x, weight, bias, seq_idx, history, silu):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape)


@backward.register_fake
def _(dy, x, weight, bias, seq_idx, history, silu):  # type: ignore[no-untyped-def]
    dhistory = history.new_empty(history.shape) if history is not None else x.new_empty(0)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(x.shape[2]), dhistory


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, ctx.silu = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, seq_idx, history = ctx.saved_tensors
    inputs = (x, weight, bias, seq_idx, history, ctx.silu)
    dx, dweight, dbias, dhistory = backward(dy.to(x.dtype), *inputs, gradient=beside.gradient_of)
    return dx, dweight, None if bias is None else dbias, None, None if history is None else dhistory, None


forward.register_autograd(_gradients, setup_context=_setup_context)
