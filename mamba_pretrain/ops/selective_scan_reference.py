"""The selective scan in pure PyTorch: the oracle of the kernels and the path of a CPU.

The reference runs two levels of time. A block of the sequence is cut into chunks; all chunks step through their inner time at once from a
zero state, which gives what each chunk adds; one pass over the few chunks gives the state each begins with; a second sweep from those
states gives every state. About 2 sqrt(length) vectorised steps instead of length, no exp of a positive number, no difference of sums.

A block (some channels, a segment of time) bounds the memory; between segments the state is carried. The backward pass recomputes a block
from the states before its chunks, which are all that is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mamba_pretrain.ops.common import without_autocast
from mamba_pretrain.ops.operator import operator
from mamba_pretrain.ops.scan_autograd import register_gradients

# Time steps of a segment, and elements (batch x time x state x channels) of a block: on a CPU what stays in the cache pays.
SEGMENT = 2048
BLOCK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 26}
MIN_CHANNELS = 32


# -- one block: some channels of some time, step-major ------------------------------------------------------------------------------------


@dataclass
class _Block:
    """Operands of a block, laid out (steps, batch x chunks, ...), states as (..., n, channels) so that inner loops are long."""

    delta: Tensor  # (T, m, k)
    du: Tensor  # (T, m, k): delta * u
    B: Tensor  # (T, m, n)
    C: Tensor  # (T, m, n)
    A: Tensor  # (n, k)
    starts: Tensor | None  # (T, m) bool
    batch: int

    def decays(self) -> Tensor:
        """exp(delta A), exactly 0 where a document begins: (T, m, n, k)."""
        a = (self.delta.unsqueeze(2) * self.A).exp_()
        if self.starts is not None:
            a[self.starts] = 0.0
        return a

    def chunk_decay(self) -> Tensor:
        """Product of a chunk's decays: (m, n, k)."""
        product = (self.delta.sum(0).unsqueeze(1) * self.A).exp_()
        if self.starts is not None:
            product[self.starts.any(0)] = 0.0
        return product

    def inputs(self) -> Tensor:
        """What each step adds to the state, delta u B: (T, m, n, k)."""
        return self.du.unsqueeze(2) * self.B.unsqueeze(3)

    def by_chunk(self, x: Tensor) -> Tensor:
        """(batch x chunks, ...) as (batch, chunks, ...)."""
        return x.view(self.batch, -1, *x.shape[1:])


def _carry(added: Tensor, decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """States before each chunk (m, n, k) and after the last (b, n, k), from what chunks add and by how much they decay (b, chunks, n, k)."""
    before = torch.empty_like(added)
    for c in range(added.shape[1]):
        before[:, c] = state
        state = torch.addcmul(added[:, c], decay[:, c], state)
    return before.flatten(0, 1), state


def _sweep(a: Tensor, h: Tensor, before: Tensor) -> Tensor:
    """Turns inputs ``h`` into states in place, given the states before each chunk."""
    for t in range(len(h)):
        h[t].addcmul_(a[t], before if t == 0 else h[t - 1])
    return h


def _block_forward(block: _Block, initial: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """C . state (T, m, k), the states before each chunk (m, n, k), and the state after the block (b, n, k)."""
    a, h = block.decays(), block.inputs()
    added = h[0]
    for t in range(1, len(h)):
        added = torch.addcmul(h[t], a[t], added)
    before, final = _carry(block.by_chunk(added), block.by_chunk(block.chunk_decay()), initial)
    h = _sweep(a, h, before)
    return torch.matmul(block.C.unsqueeze(2), h).squeeze(2), before, final


@dataclass
class _BlockGradients:
    """Gradients of a block's operands; ``y`` is C . state, recomputed on the way."""

    y: Tensor
    delta: Tensor
    du: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    initial: Tensor


def _block_backward(block: _Block, before: Tensor, dy: Tensor, dfinal: Tensor) -> _BlockGradients:
    """From ``dy`` (T, m, k) and the gradient of the state after the block (b, n, k)."""
    a = block.decays()
    h = _sweep(a, block.inputs(), before)
    y = torch.matmul(block.C.unsqueeze(2), h).squeeze(2)
    dC = torch.matmul(h, dy.unsqueeze(3)).squeeze(3)
    g, dinitial = _adjoints(block, a, dy, dfinal)
    ddu = torch.matmul(block.B.unsqueeze(2), g).squeeze(2)
    dB = torch.matmul(g, block.du.unsqueeze(3)).squeeze(3)
    # d(delta A) = adjoint * decay * previous state; 0 where a document begins, since the decay is.
    dlog = a.mul_(g)
    dlog[1:].mul_(h[:-1])
    dlog[0].mul_(before)
    ddelta = torch.mul(dlog, block.A, out=g).sum(2)
    dA = dlog.mul_(block.delta.unsqueeze(2)).sum((0, 1))
    return _BlockGradients(y, ddelta, ddu, dA, dB, dC, dinitial)


def _adjoints(block: _Block, a: Tensor, dy: Tensor, dfinal: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of every state (T, m, n, k) and of the state before the block (b, n, k): the same two levels, backward in time."""
    g = dy.unsqueeze(2) * block.C.unsqueeze(3)
    steps = len(g)
    local = g[-1]
    for t in range(steps - 2, -1, -1):
        local = torch.addcmul(g[t], a[t + 1], local)
    added, decay = block.by_chunk(a[0] * local), block.by_chunk(block.chunk_decay())
    after, dinitial = _carry(added.flip(1), decay.flip(1), dfinal)
    g[-1].add_(block.by_chunk(after).flip(1).flatten(0, 1))
    for t in range(steps - 2, -1, -1):
        g[t].addcmul_(a[t + 1], g[t + 1])
    return g, dinitial


# -- the whole sequence, block by block ---------------------------------------------------------------------------------------------------


@dataclass
class _Operands:
    """Inputs of the op and how they are cut into blocks."""

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    delta_bias: Tensor | None
    starts: Tensor | None

    def __post_init__(self) -> None:
        batch, length, channels = self.u.shape
        segment = min(length, SEGMENT)
        self.steps = 1 << max(0, round(segment.bit_length() / 2 - 0.5))  # near sqrt(segment), a power of 2: divides SEGMENT
        self.chunks = -(-length // self.steps)
        budget = BLOCK_ELEMENTS.get(self.u.device.type, BLOCK_ELEMENTS["cpu"])
        self.width = min(channels, max(MIN_CHANNELS, budget // max(1, batch * segment * self.A.shape[1])))

    def channel_slices(self) -> Iterator[slice]:
        """Slices of the channels, one block wide each."""
        channels = self.u.shape[2]
        return (slice(i, min(i + self.width, channels)) for i in range(0, channels, self.width))

    def segments(self) -> list[slice]:
        """Slices of time."""
        length = self.u.shape[1]
        return [slice(i, min(i + SEGMENT, length)) for i in range(0, length, SEGMENT)]

    def chunk_slice(self, time: slice) -> slice:
        """Chunks of a segment."""
        return slice(time.start // self.steps, -(-time.stop // self.steps))

    def to_steps(self, x: Tensor) -> Tensor:
        """(b, segment, k) as (T, b x chunks, k) fp32. Padding is zero: a step with delta = 0 changes nothing."""
        batch, length, width = x.shape
        chunks = -(-length // self.steps)
        x = F.pad(x.float(), (0, 0, 0, chunks * self.steps - length))
        return x.view(batch, chunks, self.steps, width).permute(2, 0, 1, 3).reshape(self.steps, batch * chunks, width)

    def to_time(self, x: Tensor, time: slice) -> Tensor:
        """(T, b x chunks, k) back to (b, segment, k)."""
        batch = self.u.shape[0]
        return x.view(self.steps, batch, -1, x.shape[2]).permute(1, 2, 0, 3).flatten(1, 2)[:, : time.stop - time.start]

    def raw_delta(self, time: slice, channels: slice) -> Tensor:
        """delta + delta_bias before the softplus: (b, segment, k) fp32."""
        raw = self.delta[:, time, channels].float()
        return raw if self.delta_bias is None else raw + self.delta_bias[channels].float()

    def block(self, time: slice, channels: slice) -> _Block:
        """The operands of a block."""
        delta = F.softplus(self.raw_delta(time, channels))
        starts = None
        if self.starts is not None:
            starts = self.to_steps(self.starts[:, time, None]).squeeze(2) > 0
        return _Block(
            delta=self.to_steps(delta),
            du=self.to_steps(delta * self.u[:, time, channels].float()),
            B=self.to_steps(self.B[:, time]),
            C=self.to_steps(self.C[:, time]),
            A=self.A[channels].float().t().contiguous(),
            starts=starts,
            batch=self.u.shape[0],
        )


def _forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    starts: Tensor | None,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    ops = _Operands(u, delta, A, B, C, D, z, delta_bias, starts)
    y, final, before = _empty_outputs(ops)
    for channels in ops.channel_slices():
        state = final.new_zeros(final[:, channels].shape) if initial_state is None else initial_state[:, channels].float()
        state = state.transpose(1, 2)
        for time in ops.segments():
            out, chunk_states, state = _block_forward(ops.block(time, channels), state)
            out = ops.to_time(out, time)
            if D is not None:
                out = out + D[channels].float() * u[:, time, channels].float()
            y[:, time, channels] = out if z is None else out * F.silu(z[:, time, channels].float())
            before[:, ops.chunk_slice(time), :, channels] = chunk_states.view(len(u), -1, *chunk_states.shape[1:])
        final[:, channels] = state.transpose(1, 2)
    return y, final, before


def _empty_outputs(ops: _Operands) -> tuple[Tensor, Tensor, Tensor]:
    batch, _, channels = ops.u.shape
    n = ops.A.shape[1]
    y = ops.u.new_empty(ops.u.shape)
    final = ops.u.new_empty((batch, channels, n), dtype=torch.float32)
    return y, final, ops.u.new_empty((batch, ops.chunks, n, channels), dtype=torch.float32)


def _backward(
    dy: Tensor,
    dfinal: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    starts: Tensor | None,
    before: Tensor,
) -> tuple[Tensor, ...]:
    ops = _Operands(u, delta, A, B, C, D, z, delta_bias, starts)
    grads = _Gradients.zeros(ops)
    dfinal = torch.zeros_like(grads.initial) if dfinal is None else dfinal
    for channels in ops.channel_slices():
        state = dfinal[:, channels].float().transpose(1, 2)
        for time in reversed(ops.segments()):
            state = _accumulate(ops, grads, time, channels, dy[:, time, channels].float(), state, before)
        grads.initial[:, channels] = state.transpose(1, 2)
    return grads.in_order()


@dataclass
class _Gradients:
    """Gradients of the op's inputs; those of absent ones are empty."""

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor
    z: Tensor
    delta_bias: Tensor
    initial: Tensor

    @classmethod
    def zeros(cls, ops: _Operands) -> _Gradients:
        """Accumulators for sums, and uninitialised memory for what is written once."""
        (batch, _, channels), n, new = ops.u.shape, ops.A.shape[1], ops.u.new_zeros
        fp32 = torch.float32
        return cls(
            u=torch.empty_like(ops.u),
            delta=torch.empty_like(ops.delta),
            A=new(ops.A.shape, dtype=fp32),
            B=new(ops.B.shape, dtype=fp32),
            C=new(ops.C.shape, dtype=fp32),
            D=new(channels if ops.D is not None else 0, dtype=fp32),
            z=torch.empty_like(ops.z) if ops.z is not None else new(0),
            delta_bias=new(channels if ops.delta_bias is not None else 0, dtype=fp32),
            initial=new((batch, channels, n), dtype=fp32),
        )

    def in_order(self) -> tuple[Tensor, ...]:
        """As the backward op returns them."""
        return self.u, self.delta, self.A, self.B, self.C, self.D, self.z, self.delta_bias, self.initial


def _accumulate(ops: _Operands, grads: _Gradients, time: slice, channels: slice, dout: Tensor, dstate: Tensor, before: Tensor) -> Tensor:
    """Adds one block's gradients; returns the gradient of the state before it."""
    block = ops.block(time, channels)
    u = ops.u[:, time, channels].float()
    gate = None if ops.z is None else ops.z[:, time, channels].float()
    dy = dout if gate is None else dout * F.silu(gate)
    chunk_states = before[:, ops.chunk_slice(time), :, channels].flatten(0, 1)
    found = _block_backward(block, chunk_states, ops.to_steps(dy), dstate)
    ddu, raw = ops.to_time(found.du, time), ops.raw_delta(time, channels)
    ddelta = (ops.to_time(found.delta, time) + ddu * u) * torch.sigmoid(raw)
    du = ddu * F.softplus(raw)
    y = ops.to_time(found.y, time)
    if ops.D is not None:
        D = ops.D[channels].float()
        du, y = du + D * dy, y + D * u
        grads.D[channels] += (dy * u).sum((0, 1))
    if gate is not None:
        s = torch.sigmoid(gate)
        grads.z[:, time, channels] = dout * y * s * (1 + gate * (1 - s))
    if ops.delta_bias is not None:
        grads.delta_bias[channels] += ddelta.sum((0, 1))
    grads.u[:, time, channels] = du
    grads.delta[:, time, channels] = ddelta
    grads.A[channels] += found.A.t()
    grads.B[:, time] += ops.to_time(found.B, time)
    grads.C[:, time] += ops.to_time(found.C, time)
    return found.initial


# -- custom operators: opaque to torch.compile, with gradients ------------------------------------------------------------------------------

_INPUTS = "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, Tensor? starts"


@operator("selective_scan_forward", schema=f"({_INPUTS}, Tensor? initial_state) -> (Tensor, Tensor, Tensor)")
def forward(u, delta, A, B, C, D, z, delta_bias, starts, initial_state):  # type: ignore[no-untyped-def]
    """y (b, l, d), the final state (b, d, n), and the states before chunks (b, chunks, n, d) that the backward pass starts from."""
    with without_autocast(u):
        return _forward(u, delta, A, B, C, D, z, delta_bias, starts, initial_state)


@operator(
    "selective_scan_backward",
    schema=f"(Tensor dy, Tensor? dfinal, {_INPUTS}, Tensor before) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def backward(dy, dfinal, u, delta, A, B, C, D, z, delta_bias, starts, before):  # type: ignore[no-untyped-def]
    """Gradients of (u, delta, A, B, C, D, z, delta_bias, initial_state); empty tensors for absent inputs."""
    with without_autocast(u):
        return _backward(dy, dfinal, u, delta, A, B, C, D, z, delta_bias, starts, before)


@forward.register_fake
def _(u, delta, A, B, C, D, z, delta_bias, starts, initial_state):  # type: ignore[no-untyped-def]
    return _empty_outputs(_Operands(u, delta, A, B, C, D, z, delta_bias, starts))


@backward.register_fake
def _(dy, dfinal, u, delta, A, B, C, D, z, delta_bias, starts, before):  # type: ignore[no-untyped-def]
    return _Gradients.zeros(_Operands(u, delta, A, B, C, D, z, delta_bias, starts)).in_order()


register_gradients(forward, backward)
