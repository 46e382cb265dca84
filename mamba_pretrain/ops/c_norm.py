"""Mamba-2's gated norm on CPUs by a C kernel of our own: custom operators with gradients, and their registration."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from mamba_pretrain.ops import cc, registry
from mamba_pretrain.ops.kernel_arguments import Rows, adjacent, fields, pointer, rows, struct
from mamba_pretrain.ops.rms_norm import output_dtype

# As in the source.
SOURCE = "gated_rms_norm"
TASK_ROWS = 64

Params = struct(
    "Params",
    **fields("x z dy", Rows),
    **fields("weight y dx dz dweight", ctypes.c_void_p),
    **fields("count channels size", ctypes.c_int64),
    eps=ctypes.c_float,
)


def unsupported(request: registry.Request) -> str | None:
    """Why this kernel cannot serve."""
    return cc.unsupported(request) or cc.unavailable(SOURCE)


@registry.register("gated_rms_norm", "c", priority=10, unsupported=unsupported)
def gated_rms_norm(x: Tensor, z: Tensor, weight: Tensor, eps: float, group_size: int | None) -> Tensor:
    """Computes in fp32 whatever the inputs are stored in."""
    count, channels = x.shape[:-1].numel(), x.shape[-1]
    flat_x, flat_z = (t.float().reshape(count, channels) for t in (x, z))
    return forward(flat_x, flat_z, weight.float(), eps, group_size or channels).view(x.shape).to(output_dtype(x))


def _tasks(x: Tensor) -> int:
    return -(-len(x) // TASK_ROWS)


def _run(function: str, eps: float, size: int, weight: Tensor, views: dict[str, Tensor], **outputs: Tensor) -> None:
    held = {name: adjacent(t)[None] for name, t in views.items()}
    weight = weight.contiguous()
    count, channels = views["x"].shape
    plain = {"weight": pointer(weight), **{name: pointer(t) for name, t in outputs.items()}}
    params = Params(**{name: rows(t) for name, t in held.items()}, **plain, count=count, channels=channels, size=size, eps=eps)
    cc.run(SOURCE, function, params, _tasks(views["x"]))


@torch.library.custom_op("mamba_pretrain::c_gated_rms_norm_forward", mutates_args=(), device_types="cpu")
def forward(x: Tensor, z: Tensor, weight: Tensor, eps: float, size: int) -> Tensor:
    """y (rows, d) of ``x``, ``z`` (rows, d) and weight (d), fp32; groups of ``size`` channels."""
    y = x.new_empty(x.shape)
    _run("gated_rms_norm_forward", eps, size, weight, {"x": x, "z": z}, y=y)
    return y


@torch.library.custom_op("mamba_pretrain::c_gated_rms_norm_backward", mutates_args=(), device_types="cpu")
def backward(dy: Tensor, x: Tensor, z: Tensor, weight: Tensor, eps: float, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, z and weight."""
    dx, dz, parts = x.new_empty(x.shape), x.new_empty(x.shape), x.new_zeros(_tasks(x), x.shape[1])
    _run("gated_rms_norm_backward", eps, size, weight, {"x": x, "z": z, "dy": dy}, dx=dx, dz=dz, dweight=parts)
    return dx, dz, parts.sum(0)


@forward.register_fake
def _(x, z, weight, eps, size):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape)


@backward.register_fake
def _(dy, x, z, weight, eps, size):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape), x.new_empty(x.shape), weight.new_empty(weight.shape)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    x, z, weight, ctx.eps, ctx.size = inputs
    ctx.save_for_backward(x, z, weight)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return *backward(dy, *ctx.saved_tensors, ctx.eps, ctx.size), None, None


forward.register_autograd(_gradients, setup_context=_setup_context)
