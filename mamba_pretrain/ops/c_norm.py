"""Root-mean-square norms on CPUs by a C kernel of our own: custom operators with gradients, and their registration."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from mamba_pretrain.ops import cc, registry
from mamba_pretrain.ops.kernel_arguments import Rows, fields, struct
from mamba_pretrain.ops.operator import operator
from mamba_pretrain.ops.rms_norm import output_dtype

# As in the source.
SOURCE = "rms_norm"
TASK_ROWS = 64

Params = struct(
    "Params",
    **fields("x other dy dtotal", Rows),
    **fields("weight y total dx dother dweight", ctypes.c_void_p),
    **fields("count channels size", ctypes.c_int64),
    eps=ctypes.c_float,
)


def unsupported(request: registry.Request) -> str | None:
    """Why this kernel cannot serve."""
    return cc.unsupported(request) or cc.unavailable(SOURCE)


@registry.register("rms_norm", "c", priority=10, unsupported=unsupported)
def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> Tensor | tuple[Tensor, Tensor]:
    """Computes in fp32 whatever the inputs are stored in."""
    y, total = plain_forward(_flat(x), None if residual is None else _flat(residual), weight.float(), eps)
    y = y.view(x.shape).to(output_dtype(x))
    return y if residual is None else (y, total.view(x.shape))


@registry.register("gated_rms_norm", "c", priority=10, unsupported=unsupported)
def gated_rms_norm(x: Tensor, z: Tensor, weight: Tensor, eps: float, group_size: int | None) -> Tensor:
    """Computes in fp32 whatever the inputs are stored in."""
    return gated_forward(_flat(x), _flat(z), weight.float(), eps, group_size or x.shape[-1]).view(x.shape).to(output_dtype(x))


def _flat(t: Tensor) -> Tensor:
    return t.float().reshape(-1, t.shape[-1])


def _tasks(x: Tensor) -> int:
    return -(-len(x) // TASK_ROWS)


def _call(function: str, eps: float, size: int, views: dict[str, Tensor | None], **others: Tensor | None) -> None:
    """``views``: (rows, d)."""
    x = views["x"]
    assert x is not None
    strided = {name: None if t is None else t[None] for name, t in views.items()}
    cc.call(SOURCE, function, Params, _tasks(x), strided, others, count=len(x), channels=x.shape[1], size=size, eps=eps)


# -- norm of x, or of x + residual ----------------------------------------------------------------------------------------------------------


@operator("c_rms_norm_forward", device_types="cpu")
def plain_forward(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y and x + residual (empty without a residual), all (rows, d) fp32."""
    y, total = x.new_empty(x.shape), x.new_empty(x.shape if residual is not None else 0)
    views = {"x": x, "other": residual}
    _call("rms_norm_forward", eps, x.shape[1], views, weight=weight, y=y, total=total if residual is not None else None)
    return y, total


@operator("c_rms_norm_backward", device_types="cpu")
def plain_backward(
    dy: Tensor, dtotal: Tensor | None, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Gradients of x, which is the residual's as well, and of the weight."""
    dx, parts = x.new_empty(x.shape), x.new_zeros(_tasks(x), x.shape[1])
    views = {"x": x, "other": residual, "dy": dy, "dtotal": dtotal}
    _call("rms_norm_backward", eps, x.shape[1], views, weight=weight, dx=dx, dweight=parts)
    return dx, parts.sum(0)


@plain_forward.register_fake
def _(x, residual, weight, eps):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape), x.new_empty(x.shape if residual is not None else 0)


@plain_backward.register_fake
def _(dy, dtotal, x, residual, weight, eps):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _setup_plain(ctx: Any, inputs: Any, output: Any) -> None:
    x, residual, weight, ctx.eps = inputs
    ctx.save_for_backward(x, residual, weight)
    ctx.set_materialize_grads(False)


def _plain_gradients(ctx: Any, dy: Tensor | None, dtotal: Tensor | None) -> tuple[Tensor | None, ...]:
    x, residual, weight = ctx.saved_tensors
    dy = torch.zeros_like(x) if dy is None else dy
    dx, dweight = plain_backward(dy, None if residual is None else dtotal, x, residual, weight, ctx.eps)
    return dx, None if residual is None else dx, dweight, None


plain_forward.register_autograd(_plain_gradients, setup_context=_setup_plain)


# -- norm of x silu(z) ----------------------------------------------------------------------------------------------------------------------


@operator("c_gated_rms_norm_forward", device_types="cpu")
def gated_forward(x: Tensor, z: Tensor, weight: Tensor, eps: float, size: int) -> Tensor:
    """y (rows, d) of ``x``, ``z`` (rows, d) and weight (d), fp32; groups of ``size`` channels."""
    y = x.new_empty(x.shape)
    _call("gated_rms_norm_forward", eps, size, {"x": x, "other": z}, weight=weight, y=y)
    return y


@operator("c_gated_rms_norm_backward", device_types="cpu")
def gated_backward(dy: Tensor, x: Tensor, z: Tensor, weight: Tensor, eps: float, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, z and weight."""
    dx, dz, parts = x.new_empty(x.shape), x.new_empty(x.shape), x.new_zeros(_tasks(x), x.shape[1])
    _call("gated_rms_norm_backward", eps, size, {"x": x, "other": z, "dy": dy}, weight=weight, dx=dx, dother=dz, dweight=parts)
    return dx, dz, parts.sum(0)


@gated_forward.register_fake
def _(x, z, weight, eps, size):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape)


@gated_backward.register_fake
def _(dy, x, z, weight, eps, size):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape), x.new_empty(x.shape), weight.new_empty(weight.shape)


def _setup_gated(ctx: Any, inputs: Any, output: Any) -> None:
    x, z, weight, ctx.eps, ctx.size = inputs
    ctx.save_for_backward(x, z, weight)


def _gated_gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return *gated_backward(dy, *ctx.saved_tensors, ctx.eps, ctx.size), None, None


gated_forward.register_autograd(_gated_gradients, setup_context=_setup_gated)
