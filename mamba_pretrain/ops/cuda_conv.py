"""The causal convolution by kernels of our own: channel-last, strided, deterministic, with document boundaries.

They make a Mamba-1 run independent of compiled packages. causal-conv1d's kernels, where installed, are preferred.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from mamba_pretrain.ops import nvrtc, registry
from mamba_pretrain.ops.causal_conv1d import final_inputs, inputs_before
from mamba_pretrain.ops.common import document_numbers
from mamba_pretrain.ops.cuda_scan_kernels import SCALAR_TYPES, whole_vectors
from mamba_pretrain.ops.kernel_arguments import Rows, fields, pointer, rows, struct

MAX_TAPS = 8
STRIP = 64  # steps that a thread follows, as in conv.cuh
BLOCK = 128

ConvParams = struct(
    "ConvParams",
    **fields("x dy", Rows),
    **fields("weight bias seq_idx history y dx dhistory sums", ctypes.c_void_p),
    **fields("length channels", ctypes.c_int),
)


def unsupported(request: registry.Request) -> str | None:
    """Why these kernels cannot serve."""
    if request.device != "cuda":
        return f"it needs a CUDA device, not {request.device}"
    x, taps = request["x"], request["weight"].shape[1]
    if not 1 <= taps <= MAX_TAPS:
        return f"it has 1 to {MAX_TAPS} taps, not {taps}"
    if x.dtype not in SCALAR_TYPES:
        return f"it computes in fp32, fp16 or bf16, not {x.dtype}"
    if torch.cuda.get_device_capability(x.device) < (8, 0):
        return "it needs compute capability 8.0 or newer"
    if x.numel() == 0 or x.shape[0] > 65535 or x.shape[1] > 65535 * STRIP:
        return f"it takes 1 to 65535 rows of 1 to {65535 * STRIP} steps, not {tuple(x.shape)}"
    return nvrtc.unavailable()


@registry.register("causal_conv1d", "cuda", priority=10, unsupported=unsupported)
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
    y = forward(x, weight.float().t(), None if bias is None else bias.float(), seq_idx, history, activation == "silu")
    if not return_final_state:
        return y
    return y, final_inputs(x, inputs_before(x, weight, history), document_numbers(seq_idx))


@functools.cache
def _kernel(name: str, dtype: torch.dtype, taps: int, vector: bool, has_seq: bool, silu: bool, device: int) -> nvrtc.Kernel:
    macros = {
        "SCALAR_TYPE": SCALAR_TYPES[dtype],
        "TAPS": taps,
        "CHANNELS": 4 if vector else 1,
        "HAS_SEQ": int(has_seq),
        "SILU": int(silu),
    }
    return nvrtc.kernel(f"{name}.cu", macros, BLOCK, device)


def launch(
    name: str, x: Tensor, dy: Tensor | None, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None, silu: bool, **outputs: Any
) -> None:
    """Runs a pass. x and dy with adjacent channels, the rest contiguous; ``outputs`` fill the other pointers of the arguments."""
    batch, length, channels = x.shape
    vector = whole_vectors(channels, x, dy, outputs.get("history"))
    kernel = _kernel(name, x.dtype, len(weight), vector, seq_idx is not None, silu, x.device.index)
    tensors = {"weight": weight, "bias": bias, "seq_idx": seq_idx, **outputs}
    params = ConvParams(x=rows(x), dy=rows(dy), length=length, channels=channels, **{k: pointer(t) for k, t in tensors.items()})
    per_block = BLOCK * (4 if vector else 1)
    kernel((-(-channels // per_block), -(-length // STRIP), batch), params)


def run_forward(x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None, history: Tensor | None, silu: bool) -> Tensor:
    """y (b, l, d); weight (taps, d) fp32."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    launch("conv_forward", x, None, weight, bias, seq_idx, silu, history=history, y=y)
    return y


def run_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None, history: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight (taps, d), bias and history (empty if absent)."""
    batch, length, channels = x.shape
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dhistory = torch.empty_like(history) if history is not None else x.new_empty(0)
    sums = torch.empty(batch * -(-length // STRIP), len(weight) + 1, channels, dtype=torch.float32, device=x.device)
    outputs = {"history": history, "dx": dx, "dhistory": dhistory if history is not None else None, "sums": sums}
    launch("conv_backward", x, dy, weight, bias, seq_idx, silu, **outputs)
    total = sums.sum(0)
    return dx, total[:-1].clone(), total[-1].clone(), dhistory


def _plain(x: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """x with adjacent channels, the others contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous(), *(None if t is None else t.contiguous() for t in others)


@torch.library.custom_op(
    "mamba_pretrain::cuda_conv1d_forward",
    mutates_args=(),
    device_types="cuda",
    schema="(Tensor x, Tensor weight, Tensor? bias, Tensor? seq_idx, Tensor? history, bool silu) -> Tensor",
)
def forward(x, weight, bias, seq_idx, history, silu):  # type: ignore[no-untyped-def]
    """See ``run_forward``."""
    with torch.cuda.device(x.device):
        x, weight, bias, seq_idx, history = _plain(x, weight, bias, seq_idx, history)
        return run_forward(x, weight, bias, seq_idx, history, silu)


@torch.library.custom_op(
    "mamba_pretrain::cuda_conv1d_backward",
    mutates_args=(),
    device_types="cuda",
    schema="(Tensor dy, Tensor x, Tensor weight, Tensor? bias, Tensor? seq_idx, Tensor? history, bool silu) -> (Tensor, Tensor, Tensor, Tensor)",
)
def backward(dy, x, weight, bias, seq_idx, history, silu):  # type: ignore[no-untyped-def]
    """See ``run_backward``."""
    with torch.cuda.device(x.device):
        dy = dy if dy.stride(-1) == 1 else dy.contiguous()
        x, weight, bias, seq_idx, history = _plain(x, weight, bias, seq_idx, history)
        return run_backward(dy, x, weight, bias, seq_idx, history, silu)


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
    dx, dweight, dbias, dhistory = backward(dy.to(x.dtype), x, weight, bias, seq_idx, history, ctx.silu)
    return dx, dweight, None if bias is None else dbias, None, None if history is None else dhistory, None


forward.register_autograd(_gradients, setup_context=_setup_context)
