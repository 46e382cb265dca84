"""The selective scan on CPUs by a C kernel of our own: custom operators with gradients, and their registration.

One pass over the sequence with the state in registers instead of a chain of tensor operations; results do not depend on the number of threads.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from mamba_pretrain.ops import cc, registry
from mamba_pretrain.ops.common import document_starts
from mamba_pretrain.ops.kernel_arguments import Rows, fields, struct
from mamba_pretrain.ops.operator import operator
from mamba_pretrain.ops.scan_autograd import register_gradients

# As in the source.
SOURCE = "selective_scan"
CHUNK = 32  # steps between kept states
MAX_STATES = 256

Params = struct(
    "Params",
    **fields("u delta z B C dy", Rows),
    **fields("A D bias starts initial dfinal y final checkpoints du ddelta dz dA dD dbias dinitial dB dC", ctypes.c_void_p),
    **fields("length channels states", ctypes.c_int64),
)

_INPUTS = "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, Tensor? starts"


def unsupported(request: registry.Request) -> str | None:
    """Why this kernel cannot serve."""
    if (why := cc.unsupported(request)) is not None:
        return why
    if (states := request["A"].shape[1]) > MAX_STATES:
        return f"it takes up to {MAX_STATES} states a channel, not {states}"
    return cc.unavailable(SOURCE)


@registry.register("selective_scan", "c", priority=10, unsupported=unsupported)
def selective_scan(
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
    """Computes in fp32 whatever the inputs are stored in; y has u's dtype."""
    inputs = [None if t is None else t.float() for t in (u, delta, A, B, C, D, z, delta_bias)]
    initial = None if initial_state is None else initial_state.float()
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (*inputs, initial))
    y, final, _ = forward(*inputs, document_starts(seq_idx), initial, save)
    y = y.to(u.dtype)
    return (y, final) if return_final_state else y


def _call(function: str, inputs: tuple[Tensor | None, ...], dy: Tensor | None = None, **others: Tensor | None) -> None:
    u, delta, A, B, C, D, z, bias, starts = inputs
    assert u is not None
    assert A is not None
    strided = {"u": u, "delta": delta, "z": z, "B": B, "C": C, "dy": dy}
    whole = {"A": A.t(), "D": D, "bias": bias, "starts": starts, **others}
    tasks = u.shape[0] * cc.channel_groups(u)
    cc.call(SOURCE, function, Params, tasks, strided, whole, length=u.shape[1], channels=u.shape[2], states=A.shape[1])


def _outputs(u: Tensor, A: Tensor, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, channels = u.shape
    states = A.shape[1]
    checkpoints = A.new_empty((batch, -(-length // CHUNK), states, channels) if save else (0,))
    return u.new_empty(u.shape), A.new_empty(batch, channels, states), checkpoints


@operator(
    "c_scan_forward",
    device_types="cpu",
    schema=f"({_INPUTS}, Tensor? initial_state, bool save) -> (Tensor, Tensor, Tensor)",
)
def forward(u, delta, A, B, C, D, z, delta_bias, starts, initial_state, save):  # type: ignore[no-untyped-def]
    """y (b, l, d), the final state (b, d, n) and, if ``save``, the states before chunks (b, chunks, n, d) for the backward pass."""
    y, final, checkpoints = _outputs(u, A, save)
    inputs = (u, delta, A, B, C, D, z, delta_bias, starts)
    _call("selective_scan_forward", inputs, initial=initial_state, y=y, final=final, checkpoints=checkpoints if save else None)
    return y, final, checkpoints


@operator(
    "c_scan_backward",
    device_types="cpu",
    schema=f"(Tensor dy, Tensor? dfinal, {_INPUTS}, Tensor checkpoints)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def backward(dy, dfinal, u, delta, A, B, C, D, z, delta_bias, starts, checkpoints):  # type: ignore[no-untyped-def]
    """Gradients of (u, delta, A, B, C, D, z, delta_bias, initial_state); that of an absent z is empty, of others without meaning."""
    (batch, length, channels), states, new = u.shape, A.shape[1], u.new_empty
    found = {name: new(u.shape) for name in ("du", "ddelta")}
    found["dz"] = new(u.shape if z is not None else 0)
    parts = {"dA": new(batch, states, channels), "dD": new(batch, channels), "dbias": new(batch, channels)}
    by_task = {name: new(batch, cc.channel_groups(u), length, states) for name in ("dB", "dC")}
    dinitial = new(batch, channels, states)
    inputs = (u, delta, A, B, C, D, z, delta_bias, starts)
    outputs = {**found, **parts, **by_task, "dinitial": dinitial}
    _call("selective_scan_backward", inputs, dy=dy, dfinal=dfinal, checkpoints=checkpoints, **outputs)
    dA, dD, dbias = (part.sum(0) for part in parts.values())
    dB, dC = (part.sum(1) for part in by_task.values())
    return found["du"], found["ddelta"], dA.t().contiguous(), dB, dC, dD, found["dz"], dbias, dinitial


@forward.register_fake
def _(u, delta, A, B, C, D, z, delta_bias, starts, initial_state, save):  # type: ignore[no-untyped-def]
    return _outputs(u, A, save)


@backward.register_fake
def _(dy, dfinal, u, delta, A, B, C, D, z, delta_bias, starts, checkpoints):  # type: ignore[no-untyped-def]
    channels, new = u.shape[2], u.new_empty
    dz = new(u.shape if z is not None else 0)
    shared = new(B.shape), new(C.shape), new(channels), dz, new(channels), new(u.shape[0], channels, A.shape[1])
    return new(u.shape), new(u.shape), new(A.shape), *shared


register_gradients(forward, backward, forward_only=1)  # whether to save
