"""The selective scan by kernels of our own: custom operators with gradients, and their registration.

Channel-last, strided where a model's tensors are (``u`` and ``z`` may be halves of one projection, ``B`` and ``C`` slices of another),
deterministic, with document boundaries and states in and out. Kernels: ``cuda_scan_kernels``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mamba_pretrain.ops import beside, nvrtc, registry
from mamba_pretrain.ops import cuda_scan_kernels as kernels
from mamba_pretrain.ops.kernel_arguments import adjacent, on_device_of
from mamba_pretrain.ops.operator import operator
from mamba_pretrain.ops.scan_autograd import register_gradients

_INPUTS = "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, Tensor? seq_idx"


def unsupported(request: registry.Request) -> str | None:
    """Why these kernels cannot serve."""
    if request.device != "cuda":
        return f"it needs a CUDA device, not {request.device}"
    u, states = request["u"], request["A"].shape[1]
    if states not in kernels.STATES:
        return f"it has kernels for {', '.join(map(str, kernels.STATES))} states a channel, not {states}"
    if not kernels.SCALAR_TYPES.keys() >= {u.dtype, request["delta"].dtype, request["B"].dtype, request["C"].dtype}:
        return f"it computes in fp32, fp16 or bf16, not {u.dtype}"
    if u.numel() == 0 or u.shape[0] > 65535:
        return f"it takes 1 to 65535 rows that are not empty, not {tuple(u.shape)}"
    return nvrtc.unsupported(u.device)


@registry.register("selective_scan", "cuda", priority=30, unsupported=unsupported)
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
    """Activations of different dtypes are brought to the widest of them; y has u's."""
    out_dtype = u.dtype
    activations = [u, delta, B, C] if z is None else [u, delta, B, C, z]
    if any(t.dtype != out_dtype for t in activations):
        widest = activations[0].dtype
        for t in activations:
            widest = torch.promote_types(widest, t.dtype)
        u, delta, B, C = (t.to(widest) for t in (u, delta, B, C))
        z = None if z is None else z.to(widest)
    parameters = [None if t is None else t.float() for t in (D, delta_bias, initial_state)]
    differentiable = [*activations, A, *(t for t in parameters if t is not None)]
    save = torch.is_grad_enabled() and any(t.requires_grad for t in differentiable)
    seq_idx = None if seq_idx is None else seq_idx.to(torch.int32)
    y, final, _ = forward(u, delta, A.float(), B, C, parameters[0], z, parameters[1], seq_idx, parameters[2], save)
    y = y.to(out_dtype)
    return (y, final) if return_final_state else y


def _operands(u, delta, A, B, C, D, z, delta_bias, seq_idx) -> kernels.Operands:  # type: ignore[no-untyped-def]
    u, delta, B, C, z = map(adjacent, (u, delta, B, C, z))
    A, D, delta_bias, seq_idx = (None if t is None else t.contiguous() for t in (A, D, delta_bias, seq_idx))
    return kernels.Operands(u, delta, A, B, C, D, z, delta_bias, seq_idx)


@operator(
    "cuda_scan_forward",
    device_types="cuda",
    schema=f"({_INPUTS}, Tensor? initial_state, bool save) -> (Tensor, Tensor, Tensor)",
)
def forward(u, delta, A, B, C, D, z, delta_bias, seq_idx, initial_state, save):  # type: ignore[no-untyped-def]
    """y (b, l, d), the final state (b, d, n) and, if ``save``, the states before tiles (b, tiles, d, n) for the backward pass."""
    with on_device_of(u):
        ops = _operands(u, delta, A, B, C, D, z, delta_bias, seq_idx)
        return kernels.forward(ops, None if initial_state is None else initial_state.contiguous(), save)


@operator(
    "cuda_scan_backward",
    device_types="cuda",
    schema=f"(Tensor dy, Tensor? dfinal, {_INPUTS}, Tensor checkpoints)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def backward(dy, dfinal, u, delta, A, B, C, D, z, delta_bias, seq_idx, checkpoints, gradient=beside.alone):  # type: ignore[no-untyped-def]
    """Gradients of (u, delta, A, B, C, D, z, delta_bias, initial_state); that of an absent z is empty, of others without meaning.

    ``gradient``: where that of z goes.
    """
    with on_device_of(u):
        ops = _operands(u, delta, A, B, C, D, z, delta_bias, seq_idx)
        dfinal = None if dfinal is None else dfinal.contiguous()
        dz = None if z is None else gradient(z)
        if kernels.gate_row(dz) is None:
            dz = beside.alone(z)
        return kernels.backward(ops, adjacent(dy), dfinal, checkpoints, dz).in_order()


@forward.register_fake
def _(u, delta, A, B, C, D, z, delta_bias, seq_idx, initial_state, save):  # type: ignore[no-untyped-def]
    batch, length, channels = u.shape
    state = A.new_empty(batch, channels, A.shape[1])
    tiles = (length + kernels.TILE - 1) // kernels.TILE
    checkpoints = A.new_empty((batch, tiles, channels, A.shape[1]) if save else (0,))
    return u.new_empty(u.shape), state, checkpoints


@backward.register_fake
def _(dy, dfinal, u, delta, A, B, C, D, z, delta_bias, seq_idx, checkpoints):  # type: ignore[no-untyped-def]
    channels = u.shape[2]
    activation = u.new_empty(u.shape)
    return (
        activation,
        torch.empty_like(activation),
        A.new_empty(A.shape),
        u.new_empty(B.shape),
        u.new_empty(C.shape),
        A.new_empty(channels),
        u.new_empty(u.shape if z is not None else (0,)),
        A.new_empty(channels),
        A.new_empty(u.shape[0], channels, A.shape[1]),
    )


register_gradients(forward, backward, forward_only=1, gradient=beside.gradient_of)  # not handed on: whether to save
