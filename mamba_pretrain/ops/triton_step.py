"""The steps of generation in Triton, one kernel each: with one token there is little to compute and much to launch.

Runs on CUDA, and on a CPU under Triton's interpreter (TRITON_INTERPRET=1) for tests. No gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mamba_pretrain.ops import registry
from mamba_pretrain.ops.common import triton_unsupported
from mamba_pretrain.ops.kernel_arguments import adjacent, on_device_of
from mamba_pretrain.ops.registry import Request

MAX_STATES = 256
MAX_RANK = 512
TAPS = (2, 3, 4)


def _common(request: Request) -> str | None:
    if (why := triton_unsupported(request)) is not None:
        return why
    if torch.is_grad_enabled() and any(isinstance(value, Tensor) and value.requires_grad for value in request.values()):
        return "it has no gradient"
    return None if request["state"].is_contiguous() else "it needs a contiguous state"


def conv_unsupported(request: Request) -> str | None:
    """Why the convolution's kernel cannot serve."""
    taps = request["weight"].shape[1]
    return _common(request) or (None if taps in TAPS else f"it has 2 to 4 taps, not {taps}")


def scan_unsupported(request: Request) -> str | None:
    """Why the scans' kernels cannot serve."""
    if (why := _common(request)) is not None:
        return why
    states, rank = request["state"].shape[-1], request["dt_weight"].shape[1] if request.has("dt_weight") else 1
    if states > MAX_STATES:
        return f"it holds at most {MAX_STATES} states, not {states}"
    return None if rank <= MAX_RANK else f"it projects step sizes of a rank up to {MAX_RANK}, not {rank}"


@registry.register("conv_step", "triton", priority=30, unsupported=conv_unsupported)
def conv_step(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor) -> Tensor:
    """See ``conv_step.conv_step``."""
    from mamba_pretrain.ops import triton_step_kernels

    x, (rows, channels), block = adjacent(x), x.shape, 128
    y = x.new_empty(rows, channels)
    with on_device_of(x):
        triton_step_kernels.conv_step[(-(-channels // block), rows)](
            x, weight.contiguous(), bias, state, y, x.stride(0), channels,
            HAS_BIAS=bias is not None, TAPS=weight.shape[1], BLOCK=block, num_warps=4,
        )  # fmt: skip
    return y


@registry.register("selective_step", "triton", priority=30, unsupported=scan_unsupported)
def selective_step(
    u: Tensor,
    dt: Tensor,
    dt_weight: Tensor,
    A_log: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    dt_bias: Tensor,
    state: Tensor,
) -> Tensor:
    """See ``selective_step.selective_step``."""
    from mamba_pretrain.ops import triton_step_kernels

    u, dt, B, C, z = (adjacent(t) for t in (u, dt, B, C, z))
    rows, channels, states = state.shape
    y = u.new_empty(rows, channels)
    # A program keeps what all rows share (A, the projection's rows) and walks over a few; a small batch needs every program it can get.
    block, walked = 16 if rows < 8 else 32, 4 if rows >= 32 and rows % 4 == 0 else 1
    with on_device_of(u):
        triton_step_kernels.selective_step[(-(-channels // block), rows // walked)](
            u, dt, dt_weight.contiguous(), dt_bias, A_log.contiguous(), B, C, D, z, state, y,
            u.stride(0), dt.stride(0), B.stride(0), C.stride(0), z.stride(0), channels, states, dt_weight.shape[1],
            ROWS=walked, BLOCK=block, STATES=_power(states), RANK=_power(dt_weight.shape[1]), num_warps=block // 8,
        )  # fmt: skip
    return y


@registry.register("ssd_step", "triton", priority=30, unsupported=scan_unsupported)
def ssd_step(
    x: Tensor,
    dt: Tensor,
    A_log: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    dt_limit: tuple[float, float],
) -> Tensor:
    """See ``ssd_step.ssd_step``."""
    from mamba_pretrain.ops import triton_step_kernels

    x, B, C, dt = (_packed(x), _packed(B), _packed(C), adjacent(dt))
    rows, heads, width, states = state.shape
    y = x.new_empty(rows, heads, width)
    block = min(16, _power(width))
    with on_device_of(x):
        triton_step_kernels.ssd_step[(-(-width // block), heads, rows)](
            x, dt, dt_bias, A_log, B, C, D, state, y, x.stride(0), dt.stride(0), B.stride(0), C.stride(0),
            width, states, heads // B.shape[1], *dt_limit, BLOCK=block, STATES=_power(states), num_warps=4,
        )  # fmt: skip
    return y


def _packed(t: Tensor) -> Tensor:
    """(b, k, n) whose rows are contiguous; a copy only if they are not."""
    return t if t.stride(2) == 1 and t.stride(1) == t.shape[2] else t.contiguous()


def _power(n: int) -> int:
    return 1 << (n - 1).bit_length()
