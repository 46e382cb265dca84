"""The causal convolution on CPUs by a C kernel of our own: custom operators with gradients, and their registration."""

from __future__ import annotations

import ctypes
from typing import Any

from torch import Tensor

from mamba_pretrain.ops import cc, registry
from mamba_pretrain.ops.causal_conv1d import final_inputs, inputs_before
from mamba_pretrain.ops.common import document_numbers
from mamba_pretrain.ops.kernel_arguments import Rows, fields, struct
from mamba_pretrain.ops.operator import operator

# As in the source.
SOURCE = "causal_conv1d"
MAX_TAPS = 8

Params = struct(
    "Params",
    **fields("x dy", Rows),
    **fields("weight bias document history y dx dhistory dweight dbias", ctypes.c_void_p),
    **fields("length channels taps silu", ctypes.c_int64),
)


def unsupported(request: registry.Request) -> str | None:
    """Why this kernel cannot serve."""
    if (why := cc.unsupported(request)) is not None:
        return why
    if not 1 <= (taps := request["weight"].shape[1]) <= MAX_TAPS:
        return f"it has 1 to {MAX_TAPS} taps, not {taps}"
    return cc.unavailable(SOURCE)


@registry.register("causal_conv1d", "c", priority=10, unsupported=unsupported)
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    seq_idx: Tensor | None,
    initial_state: Tensor | None,
    return_final_state: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """Computes in fp32 whatever the inputs are stored in; y has x's dtype."""
    history, document = inputs_before(x, weight, initial_state), document_numbers(seq_idx)
    offset = None if bias is None else bias.float()
    y = forward(x.float(), weight.float().t(), offset, document, history.float(), activation == "silu").to(x.dtype)
    return (y, final_inputs(x, history, document)) if return_final_state else y


def _call(function: str, x: Tensor, weight: Tensor, silu: bool, dy: Tensor | None = None, **others: Tensor | None) -> None:
    batch, length, channels = x.shape
    tasks = batch * cc.channel_groups(x)
    sizes = {"length": length, "channels": channels, "taps": len(weight), "silu": silu}
    cc.call(SOURCE, function, Params, tasks, {"x": x, "dy": dy}, {"weight": weight, **others}, **sizes)


@operator("c_conv1d_forward", device_types="cpu")
def forward(x: Tensor, weight: Tensor, bias: Tensor | None, document: Tensor | None, history: Tensor, silu: bool) -> Tensor:
    """y (b, l, d) from x, weight (w, d), document numbers (b, l) and the inputs before x, ``history`` (b, w - 1, d); all fp32."""
    y = x.new_empty(x.shape)
    _call("causal_conv1d_forward", x, weight, silu, bias=bias, document=document, history=history, y=y)
    return y


@operator("c_conv1d_backward", device_types="cpu")
def backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, document: Tensor | None, history: Tensor, silu: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias (also where there is none) and history."""
    (batch, _, channels), new = x.shape, x.new_empty
    dx, dhistory = new(x.shape), new(history.shape)
    dweight, dbias = new(batch, len(weight), channels), new(batch, channels)
    outputs = {"dx": dx, "dhistory": dhistory, "dweight": dweight, "dbias": dbias}
    _call("causal_conv1d_backward", x, weight, silu, dy, bias=bias, document=document, history=history, **outputs)
    return dx, dweight.sum(0), dbias.sum(0), dhistory


@forward.register_fake
def _(x, weight, bias, document, history, silu):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape)


@backward.register_fake
def _(dy, x, weight, bias, document, history, silu):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(x.shape[2]), history.new_empty(history.shape)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, ctx.silu = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, document, history = ctx.saved_tensors
    dx, dweight, dbias, dhistory = backward(dy, x, weight, bias, document, history, ctx.silu)
    return dx, dweight, None if bias is None else dbias, None, dhistory, None


forward.register_autograd(_gradients, setup_context=_setup_context)
