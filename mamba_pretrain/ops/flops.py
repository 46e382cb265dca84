"""Model FLOPs of the ops (a multiply-add is 2), registered for ``torch.utils.flop_counter.FlopCounterMode``.

What the algorithm needs, whatever an implementation recomputes; a backward pass counts twice its forward pass.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula


def selective_scan_flops(tokens: int, channels: int, state: int) -> int:
    """Forward: about 9 per channel and state (discretise, update, read out), the count mamba_ssm's authors use."""
    return 9 * tokens * channels * state


def ssd_scan_flops(tokens: int, length: int, chunk: int, heads: int, headdim: int, groups: int, state: int) -> int:
    """Forward (arXiv:2405.21060, section 6.3): scores and values inside a chunk, states into and out of it, passing them on."""
    chunk = min(chunk, length)
    inside = groups * chunk * state + heads * chunk * headdim
    states = 2 * heads * headdim * state
    return 2 * tokens * (inside + states) + 2 * tokens * heads * headdim * state // chunk


def causal_conv1d_flops(tokens: int, channels: int, taps: int) -> int:
    """Forward, depthwise."""
    return 2 * tokens * channels * taps


def linear_flops(tokens: int, n_in: int, n_out: int) -> int:
    """One matmul."""
    return 2 * tokens * n_in * n_out


def attention_flops(length: int, n_head: int, headdim: int) -> float:
    """Causal scores and values: a token sees (length + 1) / 2 keys on average, and only those count."""
    return 2.0 * 2 * n_head * headdim * (length + 1) / 2


for _module in (
    "causal_conv1d",
    "cross_entropy",
    "fp8",
    "matmul",
    "c_scan",
    "c_conv",
    "c_ssd",
    "cuda_scan",
    "cuda_conv",
    "selective_scan_reference",
    "ssd_scan_reference",
    "triton_ssd",
):
    importlib.import_module(f"mamba_pretrain.ops.{_module}")  # defines the operators named below
_ops = torch.ops.mamba_pretrain


@register_flop_formula([_ops.selective_scan_forward, _ops.c_scan_forward, _ops.cuda_scan_forward])
def _(u: Any, delta: Any, A: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return selective_scan_flops(u[0] * u[1], u[2], A[1])


@register_flop_formula([_ops.selective_scan_backward, _ops.c_scan_backward, _ops.cuda_scan_backward])
def _(dy: Any, dfinal: Any, u: Any, delta: Any, A: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * selective_scan_flops(u[0] * u[1], u[2], A[1])


# Their last arguments are the chunk size and the two limits of dt.
@register_flop_formula([_ops.ssd_scan_forward, _ops.c_ssd_forward, _ops.triton_ssd_forward])
def _(x: Any, dt: Any, A: Any, B: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return ssd_scan_flops(x[0] * x[1], x[1], args[-3], x[2], x[3], B[2], B[3])


@register_flop_formula([_ops.ssd_scan_backward, _ops.c_ssd_backward, _ops.triton_ssd_backward])
def _(dy: Any, dfinal: Any, x: Any, dt: Any, A: Any, B: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * ssd_scan_flops(x[0] * x[1], x[1], args[-3], x[2], x[3], B[2], B[3])


@register_flop_formula([_ops.causal_conv1d_forward, _ops.cuda_conv1d_forward])
def _(x: Any, weight: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return causal_conv1d_flops(x[0] * x[1], x[2], weight[1])


@register_flop_formula([_ops.causal_conv1d_backward, _ops.cuda_conv1d_backward])
def _(dy: Any, x: Any, weight: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * causal_conv1d_flops(x[0] * x[1], x[2], weight[1])


# The C kernels take the weight as (taps, channels).
@register_flop_formula(_ops.c_conv1d_forward)
def _(x: Any, weight: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return causal_conv1d_flops(x[0] * x[1], x[2], weight[0])


@register_flop_formula(_ops.c_conv1d_backward)
def _(dy: Any, x: Any, weight: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * causal_conv1d_flops(x[0] * x[1], x[2], weight[0])


@register_flop_formula(_ops.linear_cross_entropy_loss)
def _(hidden: Any, weight: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return linear_flops(hidden[0], hidden[1], weight[0])


@register_flop_formula(_ops.linear_cross_entropy)
def _(hidden: Any, weight: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 3 * linear_flops(hidden[0], hidden[1], weight[0])


@register_flop_formula(_ops.fp8_matmul)
def _(a: Any, a_scale: Any, b: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return linear_flops(a[0], a[1], b[0])


@register_flop_formula(_ops.add_few_inner)
def _(total: Any, a: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return linear_flops(a[0], a[1], total[1])
