"""Adapters to mamba-ssm's and causal-conv1d's CUDA and Triton kernels, and in words what those cannot do.

Written against mamba-ssm 2.3 and causal-conv1d 1.7. Their kernels compute offsets in 32 bits (state-spaces/mamba issues 884 and 1015: silently
wrong results past 2^31 elements), so every tensor they would index is bounded here.
"""

from __future__ import annotations

import functools
import importlib
import math
import os

import torch
from torch import Tensor

from mamba_pretrain.ops import registry
from mamba_pretrain.ops.causal_conv1d import final_inputs, inputs_before
from mamba_pretrain.ops.common import document_numbers
from mamba_pretrain.ops.registry import Request
from mamba_pretrain.ops.rms_norm import output_dtype

# Triton times dozens of variants of the Mamba-2 kernels at every start (40 and 48 s measured on an H100) and may choose others the next time:
# with this it keeps its choices on disk. It reads the variable when their packages are imported.
os.environ.setdefault("TRITON_CACHE_AUTOTUNING", "1")

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
MAX_OFFSET = 2**31


# -- what they cannot do --------------------------------------------------------------------------------------------------------------------


@functools.cache
def missing(module: str) -> str | None:
    """Why a module cannot be imported, or None. A build for another torch fails here with its own words."""
    try:
        importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:
        return f"{module} cannot be imported ({' '.join(str(error).split())})"
    return None


def _common(request: Request, module: str) -> str | None:
    if request.device != "cuda":
        return f"it needs a CUDA device, not {request.device}"
    if request.dtype not in FLOATS:
        return f"it computes in fp32, fp16 or bf16, not {request.dtype}"
    return missing(module)


def reach(t: Tensor) -> int:
    """Elements from the first to the last of a possibly strided tensor: what an offset must be able to count."""
    return 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0


def _too_large(**sizes: int) -> str | None:
    for name, size in sizes.items():
        if size >= MAX_OFFSET:
            return f"its 32-bit offsets would overflow: {name} spans {size} elements; use a smaller micro-batch or shorter sequences"
    return None


def _needs_gradient(request: Request) -> bool:
    return torch.is_grad_enabled() and any(isinstance(value, Tensor) and value.requires_grad for value in request.values())


def selective_scan_unsupported(request: Request) -> str | None:
    """Why mamba-ssm's selective scan cannot serve."""
    if (why := _common(request, "mamba_ssm.ops.selective_scan_interface")) is not None:
        return why
    u, n = request["u"], request["A"].shape[1]
    if request.has("seq_idx"):
        return "it has no document boundaries: states would leak from one document into the next"
    if request.has("initial_state"):
        return "it cannot start from a state"
    if request["return_final_state"] and _needs_gradient(request):
        return "its final state carries no gradient"
    if n > 256:
        return f"it holds at most 256 states a channel, not {n}"
    chunks = math.ceil(u.shape[1] / 2048)
    return _too_large(u=u.numel(), states=u.shape[0] * u.shape[2] * chunks * n * 2)


def ssd_scan_unsupported(request: Request) -> str | None:
    """Why mamba-ssm's chunked scan cannot serve."""
    if (why := _common(request, "mamba_ssm.ops.triton.ssd_combined")) is not None:
        return why
    x, B, chunk = request["x"], request["B"], request["chunk_size"]
    batch, length, heads, p = x.shape
    groups, n = B.shape[2:]
    chunks = math.ceil(length / chunk)
    return _too_large(
        x=max(reach(x), x.numel()),
        B=max(reach(B), reach(request["C"])),
        states=batch * chunks * heads * p * n,
        scores=batch * chunks * groups * chunk * chunk,
    )


def causal_conv1d_unsupported(request: Request) -> str | None:
    """Why causal-conv1d's kernel cannot serve."""
    if (why := _common(request, "causal_conv1d")) is not None:
        return why
    x, taps = request["x"], request["weight"].shape[1]
    if not 2 <= taps <= 4:
        return f"it has 2 to 4 taps, not {taps}"
    if x.shape[2] % 8:
        return f"it needs channels in multiples of 8, not {x.shape[2]}"
    return _too_large(x=max(reach(x), x.numel()))


def _norm_unsupported(request: Request, module: str) -> str | None:
    if (why := _common(request, module)) is not None:
        return why
    x = request["x"]
    channels = request.get("group_size") or x.shape[-1]
    if channels * x.element_size() > 65536:
        return f"it normalises at most 64 KB at once, not {channels} channels of {x.dtype}"
    return _too_large(x=max(reach(x), x.numel()))


def rms_norm_unsupported(request: Request) -> str | None:
    """Why mamba-ssm's fused addition and norm cannot serve."""
    return _norm_unsupported(request, "mamba_ssm.ops.triton.layer_norm")


def gated_rms_norm_unsupported(request: Request) -> str | None:
    """Why mamba-ssm's gated norm cannot serve."""
    return _norm_unsupported(request, "mamba_ssm.ops.triton.layernorm_gated")


# -- adapters -------------------------------------------------------------------------------------------------------------------------------


@registry.register("selective_scan", "mamba_ssm", priority=20, unsupported=selective_scan_unsupported)
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
    """Its kernel is channel-first, with one dtype for all activations and fp32 for A, D and the bias."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    def channel_first(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.to(u.dtype).transpose(1, 2).contiguous()

    skip, bias = (None if t is None else t.float() for t in (D, delta_bias))
    found = selective_scan_fn(
        channel_first(u),
        channel_first(delta),
        A.float(),
        channel_first(B),
        channel_first(C),
        D=skip,
        z=channel_first(z),
        delta_bias=bias,
        delta_softplus=True,
        return_last_state=return_final_state,
    )
    if not return_final_state:
        return found.transpose(1, 2).contiguous()
    return found[0].transpose(1, 2).contiguous(), found[1].float()


@registry.register("ssd_scan", "mamba_ssm", priority=20, unsupported=ssd_scan_unsupported)
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
    """Its kernel compares sequence numbers by value and gives the initial state to number 0: they are renumbered along each row."""
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    return mamba_chunk_scan_combined(
        x,
        dt,
        A.float(),
        B.to(x.dtype),
        C.to(x.dtype),
        chunk_size,
        D=None if D is None else D.float(),
        z=None if z is None else z.to(x.dtype),
        dt_bias=None if dt_bias is None else dt_bias.float(),
        initial_states=initial_state,
        seq_idx=document_numbers(seq_idx),
        dt_softplus=True,
        dt_limit=dt_limit,
        return_final_states=return_final_state,
    )


@registry.register("causal_conv1d", "causal_conv1d", priority=20, unsupported=causal_conv1d_unsupported)
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    seq_idx: Tensor | None,
    initial_state: Tensor | None,
    return_final_state: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """Its channel-last kernel takes (b, d, l) views of channel-last memory, with strides and start aligned to 8 elements."""
    from causal_conv1d import causal_conv1d_fn

    document = document_numbers(seq_idx)
    history = None if initial_state is None else initial_state.to(x.dtype).contiguous()
    y = causal_conv1d_fn(
        aligned(x).transpose(1, 2),
        weight,
        bias if bias is None else bias.to(weight.dtype),
        seq_idx=document,
        initial_states=None if history is None else history.transpose(1, 2),
        activation=activation,
    ).transpose(1, 2)
    if not return_final_state:
        return y
    return y, final_inputs(x, inputs_before(x, weight, history), document)


def aligned(x: Tensor) -> Tensor:
    """``x`` (b, l, d), copied if its channels are strided or its rows don't begin at multiples of 8 elements."""
    rows_aligned = x.stride(0) % 8 == 0 and x.stride(1) % 8 == 0 and x.storage_offset() % 8 == 0
    return x if x.stride(2) == 1 and rows_aligned else x.contiguous()


@registry.register("rms_norm", "mamba_ssm", priority=20, unsupported=rms_norm_unsupported)
def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> Tensor | tuple[Tensor, Tensor]:
    """Addition and norm in one Triton kernel; the new residual has the dtype of the old one."""
    from mamba_ssm.ops.triton.layer_norm import layer_norm_fn

    if residual is None:
        return layer_norm_fn(x, weight, None, eps=eps, is_rms_norm=True).to(output_dtype(x))
    y, new_residual = layer_norm_fn(x, weight, None, residual=residual.float(), eps=eps, prenorm=True, is_rms_norm=True)
    return y.to(output_dtype(x)), new_residual


@registry.register("gated_rms_norm", "mamba_ssm", priority=20, unsupported=gated_rms_norm_unsupported)
def gated_rms_norm(x: Tensor, z: Tensor, weight: Tensor, eps: float, group_size: int | None) -> Tensor:
    """The gate goes in before the norm, as in Mamba-2."""
    from mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn

    return rmsnorm_fn(x, weight, None, z=z.to(x.dtype), eps=eps, group_size=group_size, norm_before_gate=False).to(output_dtype(x))
