"""Triton kernels of generation's steps. States are read once and written once; offsets are 64-bit."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def softplus(x):  # type: ignore[no-untyped-def]
    """log(1 + e^x); where e^x is small, 1 + e^x loses what its logarithm is made of, and the quotient makes up for it."""
    e = tl.exp(x)
    more = 1.0 + e
    lost = tl.where(more == 1.0, 1.0, e / (more - 1.0))
    return tl.where(x > 20.0, x, tl.where(more == 1.0, e, tl.log(more) * lost))


@triton.jit
def conv_step(
    x_ptr, weight_ptr, bias_ptr, state_ptr, y_ptr, x_stride, channels,
    HAS_BIAS: tl.constexpr, TAPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Some channels of one row. All of the state is read before any of it is written; both by the same thread."""
    row = tl.program_id(1).to(tl.int64)
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = channel < channels
    state_ptr += row * (TAPS - 1) * channels + channel
    weight_ptr += channel * TAPS
    first = tl.load(state_ptr, mask=mask, other=0.0)
    if TAPS > 2:
        second = tl.load(state_ptr + channels, mask=mask, other=0.0)
    if TAPS > 3:
        third = tl.load(state_ptr + 2 * channels, mask=mask, other=0.0)
    x = tl.load(x_ptr + row * x_stride + channel, mask=mask, other=0.0)
    total = x.to(tl.float32) * tl.load(weight_ptr + TAPS - 1, mask=mask, other=0.0).to(tl.float32)
    total += first.to(tl.float32) * tl.load(weight_ptr, mask=mask, other=0.0).to(tl.float32)
    if TAPS > 2:
        total += second.to(tl.float32) * tl.load(weight_ptr + 1, mask=mask, other=0.0).to(tl.float32)
        tl.store(state_ptr, second, mask=mask)
    if TAPS > 3:
        total += third.to(tl.float32) * tl.load(weight_ptr + 2, mask=mask, other=0.0).to(tl.float32)
        tl.store(state_ptr + channels, third, mask=mask)
    tl.store(state_ptr + (TAPS - 2) * channels, x.to(state_ptr.dtype.element_ty), mask=mask)
    if HAS_BIAS:
        total += tl.load(bias_ptr + channel, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * channels + channel, (total * tl.sigmoid(total)).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def selective_step(
    u_ptr, dt_ptr, dt_weight_ptr, dt_bias_ptr, A_log_ptr, B_ptr, C_ptr, D_ptr, z_ptr, state_ptr, y_ptr,
    u_stride, dt_stride, B_stride, C_stride, z_stride, channels, states, rank,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, STATES: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """Some channels of ROWS rows, one row after another."""
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    n, r = tl.arange(0, STATES), tl.arange(0, RANK)
    own, of_n, of_r = channel < channels, n < states, r < rank
    held = own[:, None] & of_n[None, :]
    A = -tl.exp(tl.load(A_log_ptr + channel[:, None] * states + n[None, :], mask=held, other=0.0).to(tl.float32))
    weight = tl.load(dt_weight_ptr + channel[:, None] * rank + r[None, :], mask=own[:, None] & of_r[None, :], other=0.0).to(tl.float32)
    bias = tl.load(dt_bias_ptr + channel, mask=own, other=0.0).to(tl.float32)
    D = tl.load(D_ptr + channel, mask=own, other=0.0).to(tl.float32)
    for i in tl.static_range(ROWS):
        row = tl.program_id(1).to(tl.int64) * ROWS + i
        low = tl.load(dt_ptr + row * dt_stride + r, mask=of_r, other=0.0).to(tl.float32)
        delta = softplus(tl.sum(weight * low[None, :], axis=1) + bias)
        u = tl.load(u_ptr + row * u_stride + channel, mask=own, other=0.0).to(tl.float32)
        B = tl.load(B_ptr + row * B_stride + n, mask=of_n, other=0.0).to(tl.float32)
        C = tl.load(C_ptr + row * C_stride + n, mask=of_n, other=0.0).to(tl.float32)
        at = state_ptr + (row * channels + channel[:, None]) * states + n[None, :]
        state = tl.load(at, mask=held, other=0.0).to(tl.float32)
        state = state * tl.exp(delta[:, None] * A) + (delta * u)[:, None] * B[None, :]
        tl.store(at, state.to(state_ptr.dtype.element_ty), mask=held)
        z = tl.load(z_ptr + row * z_stride + channel, mask=own, other=0.0).to(tl.float32)
        y = (tl.sum(state * C[None, :], axis=1) + D * u) * z * tl.sigmoid(z)
        tl.store(y_ptr + row * channels + channel, y.to(y_ptr.dtype.element_ty), mask=own)


@triton.jit
def ssd_step(
    x_ptr, dt_ptr, dt_bias_ptr, A_log_ptr, B_ptr, C_ptr, D_ptr, state_ptr, y_ptr, x_stride, dt_stride, B_stride, C_stride,
    width, states, heads_per_group, low, high,
    BLOCK: tl.constexpr, STATES: tl.constexpr,
):  # fmt: skip
    """Some channels of one head of one row."""
    head, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    p, n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, STATES)
    own, of_n = p < width, n < states
    held = own[:, None] & of_n[None, :]
    group = head // heads_per_group
    channel = head * width + p
    at = state_ptr + ((row * tl.num_programs(1) + head) * width + p[:, None]) * states + n[None, :]
    state = tl.load(at, mask=held, other=0.0).to(tl.float32)
    delta = softplus(tl.load(dt_ptr + row * dt_stride + head).to(tl.float32) + tl.load(dt_bias_ptr + head).to(tl.float32))
    delta = tl.minimum(tl.maximum(delta, low), high)
    decay = tl.exp(-delta * tl.exp(tl.load(A_log_ptr + head).to(tl.float32)))
    x = tl.load(x_ptr + row * x_stride + channel, mask=own, other=0.0).to(tl.float32)
    B = tl.load(B_ptr + row * B_stride + group * states + n, mask=of_n, other=0.0).to(tl.float32)
    C = tl.load(C_ptr + row * C_stride + group * states + n, mask=of_n, other=0.0).to(tl.float32)
    state = state * decay + (delta * x)[:, None] * B[None, :]
    tl.store(at, state.to(state_ptr.dtype.element_ty), mask=held)
    y = tl.sum(state * C[None, :], axis=1) + tl.load(D_ptr + head).to(tl.float32) * x
    tl.store(y_ptr + row * tl.num_programs(1) * width + channel, y.to(y_ptr.dtype.element_ty), mask=own)
