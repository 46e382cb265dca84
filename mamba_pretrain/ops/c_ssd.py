"""Mamba-2's scan on CPUs by a C kernel of our own: custom operators with gradients, and their registration.

Small matrix products over short chunks whose operands stay in the cache; results do not depend on the number of threads.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from mamba_pretrain.ops import cc, registry
from mamba_pretrain.ops.common import document_starts
from mamba_pretrain.ops.kernel_arguments import Rows, fields, struct
from mamba_pretrain.ops.operator import operator
from mamba_pretrain.ops.scan_autograd import new_dxBC, parts_of_xBC, register_gradients

# As in the source.
SOURCE = "ssd_scan"
KEEP = 64  # steps between kept states
TASK_HEADS = 4
BLOCK = 64  # channels of a head that are handled together
ROWS = 8  # the state is padded to a multiple

Params = struct(
    "Params",
    **fields("x dt z B C dy y dx dz", Rows),
    **fields("A D bias starts initial dfinal final checkpoints ddt dA dD dbias dB dC dinitial", ctypes.c_void_p),
    **fields("length heads headdim groups states", ctypes.c_int64),
    **fields("dt_min dt_max", ctypes.c_float),
)

_INPUTS = "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, Tensor? starts"
_LIMITS = "float dt_min, float dt_max"


def unsupported(request: registry.Request) -> str | None:
    """Why this kernel cannot serve."""
    return cc.unsupported(request) or cc.unavailable(SOURCE)


@registry.register("ssd_scan", "c", priority=10, unsupported=unsupported)
def ssd_scan(
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
    """Computes in fp32 whatever the inputs are stored in; y has x's dtype. ``chunk_size`` changes nothing here."""
    inputs = [None if t is None else t.float() for t in (x, dt, A, B, C, D, z, dt_bias)]
    initial = None if initial_state is None else initial_state.float()
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (*inputs, initial))
    y, final, _ = forward(*inputs, document_starts(seq_idx), initial, save, chunk_size, *dt_limit)
    y = y.to(x.dtype)
    return (y, final) if return_final_state else y


def _parts(x: Tensor, B: Tensor) -> int:
    """Tasks of one group of heads."""
    return -(-(x.shape[2] // B.shape[2]) // TASK_HEADS)


def _call(
    function: str, inputs: tuple[Tensor | None, ...], limits: tuple[float, float], like_x: dict[str, Tensor | None], **others: Tensor | None
) -> None:
    """``like_x``: outputs and gradients of x's shape."""
    x, dt, A, B, C, D, z, bias, starts = inputs
    assert x is not None
    assert B is not None
    (batch, length, heads, headdim), (groups, states) = x.shape, B.shape[2:]
    flat = {key: None if t is None else t.flatten(2) for key, t in {"x": x, "z": z, "B": B, "C": C, **like_x}.items()}
    whole = {"A": A, "D": D, "bias": bias, "starts": starts, **others}
    sizes = {"length": length, "heads": heads, "headdim": headdim, "groups": groups, "states": states}
    tasks = batch * groups * _parts(x, B)
    cc.call(SOURCE, function, Params, tasks, {**flat, "dt": dt}, whole, **sizes, dt_min=limits[0], dt_max=limits[1])


def _outputs(x: Tensor, B: Tensor, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    (batch, length, heads, headdim), states = x.shape, B.shape[3]
    kept = (batch, -(-length // KEEP), heads, -(-headdim // BLOCK), -(-states // ROWS) * ROWS, BLOCK)
    return x.new_empty(x.shape), x.new_empty(batch, heads, headdim, states), x.new_empty(kept if save else (0,))


@operator(
    "c_ssd_forward",
    device_types="cpu",
    schema=f"({_INPUTS}, Tensor? initial_state, bool save, int chunk_size, {_LIMITS}) -> (Tensor, Tensor, Tensor)",
)
def forward(x, dt, A, B, C, D, z, dt_bias, starts, initial_state, save, chunk_size, dt_min, dt_max):  # type: ignore[no-untyped-def]
    """y (b, l, h, p), the final state (b, h, p, n) and, if ``save``, the states that the backward pass starts from.

    ``chunk_size`` is there for who counts the FLOPs of the model's own algorithm.
    """
    y, final, checkpoints = _outputs(x, B, save)
    inputs, outputs = (x, dt, A, B, C, D, z, dt_bias, starts), {"final": final, "checkpoints": checkpoints if save else None}
    _call("ssd_scan_forward", inputs, (dt_min, dt_max), {"y": y}, initial=initial_state, **outputs)
    return y, final, checkpoints


@operator(
    "c_ssd_backward",
    device_types="cpu",
    schema=f"(Tensor dy, Tensor? dfinal, {_INPUTS}, Tensor checkpoints, int chunk_size, {_LIMITS})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def backward(dy, dfinal, x, dt, A, B, C, D, z, dt_bias, starts, checkpoints, chunk_size, dt_min, dt_max):  # type: ignore[no-untyped-def]
    """Gradients of (x and B and C, dt, A, D, z, dt_bias, initial_state); that of an absent z is empty, of others without meaning."""
    (batch, length, heads, headdim), (groups, states), new = x.shape, B.shape[2:], x.new_empty
    dxBC, ddt, dz = new_dxBC(x, B), new(dt.shape), new(x.shape if z is not None else 0)
    dx, dB, dC = parts_of_xBC(dxBC, x, B)
    sums = {name: new(batch, heads) for name in ("dA", "dD", "dbias")}
    by_task = {name: new(batch, groups, _parts(x, B), length, states) for name in ("dB", "dC")}
    dinitial = new(batch, heads, headdim, states)
    inputs, outputs = (x, dt, A, B, C, D, z, dt_bias, starts), {"ddt": ddt, **sums, **by_task, "dinitial": dinitial}
    like_x = {"dy": dy, "dx": dx, "dz": None if z is None else dz}
    _call("ssd_scan_backward", inputs, (dt_min, dt_max), like_x, dfinal=dfinal, checkpoints=checkpoints, **outputs)
    for whole, part in zip((dB, dC), by_task.values(), strict=True):
        whole.copy_(part.sum(2).transpose(1, 2))
    dA, dD, dbias = (part.sum(0) for part in sums.values())
    return dxBC, ddt, dA, dD, dz, dbias, dinitial


@forward.register_fake
def _(x, dt, A, B, C, D, z, dt_bias, starts, initial_state, save, chunk_size, dt_min, dt_max):  # type: ignore[no-untyped-def]
    return _outputs(x, B, save)


@backward.register_fake
def _(dy, dfinal, x, dt, A, B, C, D, z, dt_bias, starts, checkpoints, chunk_size, dt_min, dt_max):  # type: ignore[no-untyped-def]
    (batch, _, heads, headdim), new = x.shape, x.new_empty
    dz = new(x.shape if z is not None else 0)
    per_head = [new(heads) for _ in range(3)]
    dinitial = new(batch, heads, headdim, B.shape[3])
    return new_dxBC(x, B), new(dt.shape), *per_head[:2], dz, per_head[2], dinitial


register_gradients(forward, backward, forward_only=1, beside=True)  # whether to save
