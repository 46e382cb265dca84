"""Mamba-2's scan in pure PyTorch: the oracle of the kernels and the path of a CPU.

The chunked algorithm of arXiv:2405.21060, section 6: inside a chunk the recurrence is a masked matmul, between chunks the state is carried.
Decays come from sums of the steps between two positions (never from a difference of running sums), so that nothing overflows, strong decays
keep their precision, and a document's numbers do not depend on the one before it, to the bit. The backward pass is written out; it recomputes
a block of chunks from the states before them, which are all that is kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from mamba_pretrain.ops.common import without_autocast
from mamba_pretrain.ops.operator import operator
from mamba_pretrain.ops.scan_autograd import new_dxBC, parts_of_xBC, register_gradients

# Time steps handled by one matmul, and elements (batch x time x heads x chunk) of a block: on a CPU what stays in the cache pays.
MAX_CHUNK = {"cpu": 64, "cuda": 128}
BLOCK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 26}


@dataclass
class _Block:
    """Operands of some chunks, fp32: c chunks, g groups of r heads, T steps a chunk.

    Matrices over time are stored (from step j, to step i), states as (n, r * p).
    """

    x: Tensor  # (c, b, T, g, r, p)
    dt: Tensor  # (c, b, g, r, T)
    A: Tensor  # (g, r)
    B: Tensor  # (c, b, g, T, n)
    C: Tensor  # (c, b, g, T, n)
    starts: Tensor | None  # (c, b, T)

    def __post_init__(self) -> None:
        a = self.dt * self.A.unsqueeze(-1)
        self.between = self._decay_between(a)  # (c, b, g, r, T, T)
        self.from_before = self._decay_from_before(a)  # (c, b, g, r, T): of the state before the chunk
        self.to_end = self.between[..., -1]  # (c, b, g, r, T): of an input in the state after the chunk
        self.mixing = self.between * (self.B @ self.C.transpose(-1, -2)).unsqueeze(3)  # (c, b, g, r, T, T), without dt
        self.inputs = _by_head(self.x, self.dt)  # dt x
        self.weighted = _by_group(self.x, self.dt * self.to_end)  # dt x, decayed to the chunk's end

    def _decay_between(self, a: Tensor) -> Tensor:
        later = torch.ones(a.shape[-1], a.shape[-1], device=a.device).triu_(1)
        decay = (a.unsqueeze(-2) * later).cumsum_(-1).exp_().triu_()
        if self.starts is not None:
            document = self.starts.cumsum(-1)
            decay.masked_fill_((document.unsqueeze(-1) != document.unsqueeze(-2))[:, :, None, None], 0.0)
        return decay

    def _decay_from_before(self, a: Tensor) -> Tensor:
        decay = a.cumsum(-1).exp_()
        if self.starts is None:
            return decay
        return decay.masked_fill_((self.starts.cumsum(-1) > 0)[:, :, None, None], 0.0)

    def outputs(self, before: Tensor) -> Tensor:
        """C . state for every step, (c, b, T, g, r, p), given the states before each chunk (c, b, g, n, r * p)."""
        inside = (self.mixing.transpose(-1, -2) @ self.inputs).permute(0, 1, 4, 2, 3, 5)
        return inside.addcmul_(self.read(before), _over_channels(self.from_before))

    def read(self, state: Tensor) -> Tensor:
        """C . state of one state a chunk: (c, b, T, g, r, p)."""
        return _split(self.C @ state, self.x.shape[-1])


def _by_head(x: Tensor, factor: Tensor) -> Tensor:
    """x (c, b, T, g, r, p) times factor (c, b, g, r, T), contiguous as (c, b, g, r, T, p)."""
    x = x.permute(0, 1, 3, 4, 2, 5)
    return torch.mul(x, factor.unsqueeze(-1), out=x.new_empty(x.shape))


def _by_group(x: Tensor, factor: Tensor) -> Tensor:
    """x (c, b, T, g, r, p) times factor (c, b, g, r, T), contiguous as (c, b, g, T, r * p)."""
    x = x.transpose(2, 3)
    return torch.mul(x, factor.transpose(-1, -2).unsqueeze(-1), out=x.new_empty(x.shape)).flatten(-2)


def _over_channels(factor: Tensor) -> Tensor:
    """(c, b, g, r, T) as (c, b, T, g, r, 1)."""
    return factor.permute(0, 1, 4, 2, 3).unsqueeze(-1)


def _over_heads(t: Tensor) -> Tensor:
    """(c, b, T, g, r) as (c, b, g, r, T)."""
    return t.permute(0, 1, 3, 4, 2)


def _split(t: Tensor, p: int) -> Tensor:
    """(c, b, g, T, r * p) as (c, b, T, g, r, p)."""
    return t.unflatten(-1, (-1, p)).transpose(2, 3)


def _carry(added: Tensor, decay: Tensor, state: Tensor, before: Tensor, reverse: bool = False) -> Tensor:
    """Writes the states before each chunk to ``before``, given what chunks add (c, b, g, n, r * p); returns the state after the last.

    ``decay`` (c, b, g, r) is each chunk's. ``reverse`` runs backward in time, for adjoints.
    """
    factors = decay.repeat_interleave(added.shape[-1] // decay.shape[-1], dim=-1).unsqueeze(-2)
    order = list(reversed(range(len(added)))) if reverse else list(range(len(added)))
    before[order[0]] = state
    for c, following in pairwise(order):
        torch.addcmul(added[c], factors[c], before[c], out=before[following])
    return torch.addcmul(added[order[-1]], factors[order[-1]], before[order[-1]])


def _block_forward(block: _Block, initial: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs and the state after the block (b, g, n, r * p); writes the states before each chunk to ``before``."""
    final = _carry(block.B.transpose(-1, -2) @ block.weighted, block.from_before[..., -1], initial, before)
    return block.outputs(before), final


@dataclass
class _BlockGradients:
    """Gradients of a block's operands, shaped like them; ``a`` is that of dt A."""

    x: Tensor
    dt: Tensor
    a: Tensor
    B: Tensor
    C: Tensor
    initial: Tensor


def _block_backward(block: _Block, before: Tensor, dy: Tensor, dfinal: Tensor) -> _BlockGradients:
    """From ``dy`` (c, b, T, g, r, p) and the gradient of the state after the block (b, g, n, r * p)."""
    decayed = _by_group(dy, block.from_before)
    after = torch.empty_like(before)
    dinitial = _carry(block.C.transpose(-1, -2) @ decayed, block.from_before[..., -1], dfinal, after, reverse=True)
    # Through the chunk's own matrix, then through the states it reads and writes. What is done with is overwritten: fresh memory costs more
    # than the arithmetic.
    dy_heads = dy.permute(0, 1, 3, 4, 2, 5).contiguous()
    dmixing = block.inputs @ dy_heads.transpose(-1, -2)
    dwritten = _split(block.B @ after, dy.shape[-1])
    dinputs = (block.mixing @ dy_heads).permute(0, 1, 4, 2, 3, 5).addcmul_(dwritten, _over_channels(block.to_end))
    dsums = block.mixing.mul_(dmixing)
    dscores = dmixing.mul_(block.between).sum(3)
    dsums[..., -1] += _over_heads(dwritten.mul_(block.x).sum(-1)) * (block.dt * block.to_end)
    dfrom_before = _over_heads(block.read(before).mul_(dy).sum(-1)) * block.from_before
    dB = (block.weighted @ after.transpose(-1, -2)).add_(dscores @ block.C)
    kept = after.mul_(before).sum(-2).unflatten(-1, dy.shape[-2:]).sum(-1)
    dfrom_before[..., -1] += kept * block.from_before[..., -1]
    return _BlockGradients(
        x=dinputs * _over_channels(block.dt),
        dt=_over_heads(dinputs.mul_(block.x).sum(-1)),
        a=_sums_backward(dsums) + dfrom_before.flip(-1).cumsum(-1).flip(-1),
        B=dB,
        C=(decayed @ before.transpose(-1, -2)).add_(dscores.transpose(-1, -2) @ block.B),
        initial=dinitial,
    )


def _sums_backward(dsums: Tensor) -> Tensor:
    """Gradient of the steps (..., T) from that of the sums (..., from j, to i): step k is in every sum with j < k <= i."""
    over_later = dsums.flip(-1).cumsum_(-1).flip(-1)
    return over_later.triu_(1).sum(-2)


# -- the whole sequence, block by block ---------------------------------------------------------------------------------------------------


@dataclass
class _Operands:
    """Inputs of the op and how they are cut into blocks of chunks."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    dt_bias: Tensor | None
    starts: Tensor | None
    chunk_size: int
    dt_min: float
    dt_max: float

    def __post_init__(self) -> None:
        batch, length, heads, self.p = self.x.shape
        self.groups, self.n = self.B.shape[2:]
        self.per_group = heads // self.groups
        device = self.x.device.type
        self.steps = max(1, min(self.chunk_size, MAX_CHUNK.get(device, MAX_CHUNK["cpu"]), length))
        self.chunks = -(-length // self.steps)
        budget = BLOCK_ELEMENTS.get(device, BLOCK_ELEMENTS["cpu"])
        self.chunks_per_block = max(1, budget // (batch * heads * self.steps**2))

    def blocks(self) -> list[tuple[slice, slice]]:
        """(time, chunks) of each block."""
        length, found = self.x.shape[1], []
        for first in range(0, self.chunks, self.chunks_per_block):
            last = min(first + self.chunks_per_block, self.chunks)
            found.append((slice(first * self.steps, min(last * self.steps, length)), slice(first, last)))
        return found

    def chunked(self, t: Tensor) -> Tensor:
        """(b, time, ...) as (c, b, T, ...) fp32. Padding is zero: a step with dt = 0 changes nothing."""
        missing = -t.shape[1] % self.steps
        t = t.float()
        if missing:
            t = torch.cat([t, t.new_zeros(t.shape[0], missing, *t.shape[2:])], dim=1)
        return t.unflatten(1, (-1, self.steps)).transpose(0, 1)

    def grouped(self, t: Tensor) -> Tensor:
        """(b, time, h, ...) as (c, b, T, g, r, ...)."""
        return self.chunked(t).unflatten(3, (self.groups, self.per_group))

    def to_time(self, t: Tensor, time: slice) -> Tensor:
        """(c, b, T, ...) back to (b, time, ...)."""
        return t.transpose(0, 1).flatten(1, 2)[:, : time.stop - time.start]

    def raw_dt(self, time: slice) -> Tensor:
        """dt + dt_bias before the softplus: (b, time, h) fp32."""
        raw = self.dt[:, time].float()
        return raw if self.dt_bias is None else raw + self.dt_bias.float()

    def block(self, time: slice) -> _Block:
        """The operands of a block."""
        dt = F.softplus(self.raw_dt(time)).clamp(self.dt_min, self.dt_max)
        return _Block(
            x=self.grouped(self.x[:, time]),
            dt=_over_heads(self.grouped(dt)).contiguous(),
            A=self.A.float().view(self.groups, self.per_group),
            B=self.chunked(self.B[:, time]).transpose(2, 3).contiguous(),
            C=self.chunked(self.C[:, time]).transpose(2, 3).contiguous(),
            starts=None if self.starts is None else self.chunked(self.starts[:, time]) > 0,
        )

    def state_in(self, state: Tensor) -> Tensor:
        """(b, h, p, n) as (b, g, n, r * p) fp32."""
        return state.float().reshape(len(state), self.groups, -1, self.n).transpose(-1, -2)

    def state_out(self, state: Tensor) -> Tensor:
        """The inverse of ``state_in``."""
        return state.transpose(-1, -2).reshape(len(state), -1, self.p, self.n)

    def empty_outputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Memory for y, the final state, and the states before chunks."""
        batch, _, heads, p = self.x.shape
        before = (self.chunks, batch, self.groups, self.n, self.per_group * p)
        y, new = self.x.new_empty(self.x.shape), self.x.new_empty
        return y, new((batch, heads, p, self.n), dtype=torch.float32), new(before, dtype=torch.float32)


def _forward(ops: _Operands, initial_state: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    y, final, before = ops.empty_outputs()
    state = ops.state_in(torch.zeros_like(final) if initial_state is None else initial_state)
    for time, chunks in ops.blocks():
        out, state = _block_forward(ops.block(time), state, before[chunks])
        out = _with_skip(ops, time, ops.to_time(out, time).flatten(2, 3))
        y[:, time] = out if ops.z is None else out * F.silu(ops.z[:, time].float())
    return y, final.copy_(ops.state_out(state)), before


def _with_skip(ops: _Operands, time: slice, y: Tensor) -> Tensor:
    """y + D x."""
    return y if ops.D is None else torch.addcmul(y, ops.x[:, time].float(), ops.D.float().unsqueeze(-1))


@dataclass
class _Gradients:
    """Gradients of the op's inputs; those of absent ones are empty. Those of x, B and C are parts of ``xBC``."""

    xBC: Tensor
    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor
    z: Tensor
    dt_bias: Tensor
    initial: Tensor

    @classmethod
    def zeros(cls, ops: _Operands) -> _Gradients:
        """Accumulators for sums, and uninitialised memory for what is written once."""
        batch, _, heads, p = ops.x.shape
        fp32, new = torch.float32, ops.x.new_zeros
        widest = torch.promote_types(torch.promote_types(ops.x.dtype, ops.B.dtype), ops.C.dtype)
        xBC = new_dxBC(ops.x, ops.B, widest)
        x, B, C = parts_of_xBC(xBC, ops.x, ops.B)
        return cls(
            xBC=xBC,
            x=x,
            dt=torch.empty_like(ops.dt),
            A=new(heads, dtype=fp32),
            B=B,
            C=C,
            D=new(heads if ops.D is not None else 0, dtype=fp32),
            z=torch.empty_like(ops.z) if ops.z is not None else new(0),
            dt_bias=new(heads if ops.dt_bias is not None else 0, dtype=fp32),
            initial=new((batch, heads, p, ops.n), dtype=fp32),
        )

    def in_order(self) -> tuple[Tensor, ...]:
        """As the backward op returns them."""
        return self.xBC, self.dt, self.A, self.D, self.z, self.dt_bias, self.initial


def _backward(ops: _Operands, dy: Tensor, dfinal: Tensor | None, before: Tensor) -> tuple[Tensor, ...]:
    grads = _Gradients.zeros(ops)
    state = ops.state_in(torch.zeros_like(grads.initial) if dfinal is None else dfinal)
    for time, chunks in reversed(ops.blocks()):
        state = _accumulate(ops, grads, time, dy[:, time].float(), state, before[chunks])
    grads.initial.copy_(ops.state_out(state))
    return grads.in_order()


def _accumulate(ops: _Operands, grads: _Gradients, time: slice, dout: Tensor, dstate: Tensor, before: Tensor) -> Tensor:
    """Adds one block's gradients; returns the gradient of the state before it."""
    block, x = ops.block(time), ops.x[:, time].float()
    dy = dout
    if ops.z is not None:
        gate = ops.z[:, time].float()
        s = torch.sigmoid(gate)
        y = _with_skip(ops, time, ops.to_time(block.outputs(before), time).flatten(2, 3))
        grads.z[:, time] = dout * y * s * (1 + gate * (1 - s))
        dy = dout * gate * s
    found = _block_backward(block, before, ops.grouped(dy), dstate)
    dx = ops.to_time(found.x, time).flatten(2, 3)
    if ops.D is not None:
        dx = torch.addcmul(dx, dy, ops.D.float().unsqueeze(-1))
        grads.D += (dy * x).sum((0, 1, 3))
    grads.x[:, time] = dx
    grads.A += (found.a * block.dt).sum((0, 1, 4)).flatten()
    dsoft = found.dt + found.a * block.A.unsqueeze(-1)
    raw = ops.raw_dt(time)
    soft = F.softplus(raw)
    inside = (soft >= ops.dt_min) & (soft <= ops.dt_max)
    ddt = ops.to_time(dsoft.permute(0, 1, 4, 2, 3), time).flatten(2) * torch.sigmoid(raw) * inside
    grads.dt[:, time] = ddt
    if ops.dt_bias is not None:
        grads.dt_bias += ddt.sum((0, 1))
    grads.B[:, time] = ops.to_time(found.B.transpose(2, 3), time)
    grads.C[:, time] = ops.to_time(found.C.transpose(2, 3), time)
    return found.initial


# -- custom operators: opaque to torch.compile, with gradients ------------------------------------------------------------------------------

_INPUTS = "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, Tensor? starts"
_OPTIONS = "int chunk_size, float dt_min, float dt_max"


@operator(
    "ssd_scan_forward",
    schema=f"({_INPUTS}, Tensor? initial_state, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
)
def forward(x, dt, A, B, C, D, z, dt_bias, starts, initial_state, chunk_size, dt_min, dt_max):  # type: ignore[no-untyped-def]
    """y (b, l, h, p), the final state (b, h, p, n), and the states before chunks that the backward pass starts from."""
    with without_autocast(x):
        return _forward(_Operands(x, dt, A, B, C, D, z, dt_bias, starts, chunk_size, dt_min, dt_max), initial_state)


@operator(
    "ssd_scan_backward",
    schema=f"(Tensor dy, Tensor? dfinal, {_INPUTS}, Tensor before, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def backward(dy, dfinal, x, dt, A, B, C, D, z, dt_bias, starts, before, chunk_size, dt_min, dt_max):  # type: ignore[no-untyped-def]
    """Gradients of (x and B and C, dt, A, D, z, dt_bias, initial_state); empty tensors for absent inputs."""
    with without_autocast(x):
        return _backward(_Operands(x, dt, A, B, C, D, z, dt_bias, starts, chunk_size, dt_min, dt_max), dy, dfinal, before)


@forward.register_fake
def _(x, dt, A, B, C, D, z, dt_bias, starts, initial_state, chunk_size, dt_min, dt_max):  # type: ignore[no-untyped-def]
    return _Operands(x, dt, A, B, C, D, z, dt_bias, starts, chunk_size, dt_min, dt_max).empty_outputs()


@backward.register_fake
def _(dy, dfinal, x, dt, A, B, C, D, z, dt_bias, starts, before, chunk_size, dt_min, dt_max):  # type: ignore[no-untyped-def]
    return _Gradients.zeros(_Operands(x, dt, A, B, C, D, z, dt_bias, starts, chunk_size, dt_min, dt_max)).in_order()


register_gradients(forward, backward, beside=True)
