"""Mamba-2's scan by Triton kernels of our own: custom operators with gradients, and their registration.

Strided where a model's tensors are (``x``, ``B`` and ``C`` may be parts of one convolution's output), deterministic, with document boundaries and
states in and out. Nothing but the inputs is kept for the backward pass, which writes the gradients of x, B and C into one tensor
(``scan_autograd`` says why). Kernels: ``triton_ssd_kernels``, ``triton_ssd_backward_kernels``.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mamba_pretrain.ops import beside, registry
from mamba_pretrain.ops.common import document_bounds, multiprocessors, triton_unsupported
from mamba_pretrain.ops.kernel_arguments import on_device_of
from mamba_pretrain.ops.operator import operator
from mamba_pretrain.ops.scan_autograd import new_dxBC, register_gradients
from mamba_pretrain.ops.triton_launch import launch

MAX_HEADDIM, MAX_STATE = 128, 256
# Compiled by Triton 3.6, tiles that are wider than a head (20 of 32 channels, 40 of 64 states, bf16) gave wrong results on an H200, though the
# interpreter gives right ones.
MIN_WIDTH = 16
MAX_STATE_BYTES = 65536  # of a head
SHORTEST_SEGMENT = 1024  # steps


@dataclass(frozen=True)
class Launch:
    """Warps of a program, stages of its loop, and most registers of a thread (0: as many as there are)."""

    warps: int
    stages: int
    registers: int = 0

    def options(self) -> dict[str, int]:
        """As Triton takes them."""
        options = {"num_warps": self.warps, "num_stages": self.stages}
        return {**options, "maxnreg": self.registers} if self.registers else options


@dataclass(frozen=True)
class Tuning:
    """Steps a chunk of the forward pass; of the backward pass steps a tile, tiles a chunk (1 or 2) and most heads a program; launches by kernel.

    ``state_block``: most elements of a state that a program of the passes along the length holds. ``keep``: see ``ssd_inside``.
    """

    chunk: int
    tile: int
    tiles: int
    heads: int
    state_block: int
    keep: bool
    forward: Launch
    states: Launch
    inside: Launch
    edges: Launch


# For compute capability 9.0 and 16-bit activations of up to 64 channels a head and 128 states: the best of those tried on an H100.
HOPPER = Tuning(
    chunk=64, tile=64, tiles=1, heads=32, state_block=8192, keep=True,
    forward=Launch(4, 2), states=Launch(4, 4), inside=Launch(4, 3), edges=Launch(4, 2),
)  # fmt: skip
# Everywhere else: fits in 99 KiB of shared memory, tuned for nothing.
PORTABLE = Tuning(
    chunk=32, tile=32, tiles=1, heads=8, state_block=4096, keep=True,
    forward=Launch(4, 1), states=Launch(4, 1), inside=Launch(4, 1), edges=Launch(4, 1),
)  # fmt: skip
PREPARE_HEADS = 8  # heads a program of the kernels that only add


def tuning(x: Tensor, B: Tensor) -> Tuning:
    """What a call is launched with."""
    small = x.shape[3] <= 64 and B.shape[3] <= 128 and x.element_size() == 2
    return HOPPER if small and _hopper(x.device) else PORTABLE


@functools.cache
def _hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


def fills_tile(width: int) -> bool:
    """Whether a head's channels, or its states, are as wide as the tile that holds them."""
    return width >= MIN_WIDTH and width & (width - 1) == 0


def unsupported(request: registry.Request) -> str | None:
    """Why these kernels cannot serve."""
    if (why := triton_unsupported(request)) is not None:
        return why
    x, state = request["x"], request["B"].shape[3]
    if x.shape[3] > MAX_HEADDIM or state > MAX_STATE:
        return f"it has at most {MAX_HEADDIM} channels a head and {MAX_STATE} states, not {x.shape[3]} and {state}"
    if (size := _block(x.shape[3]) * _block(state) * x.element_size()) > MAX_STATE_BYTES:
        return f"a head's state must fit in {MAX_STATE_BYTES} bytes, not {size}"
    if x.device.type == "cpu" and x.dtype == torch.bfloat16:
        return "Triton's interpreter has no products in bf16"
    if x.device.type == "cuda" and not (fills_tile(x.shape[3]) and fills_tile(state)):
        return f"it is right for powers of two from {MIN_WIDTH} on only, not {x.shape[3]} channels a head and {state} states"
    if x.numel() == 0 or x.shape[0] > 65535:
        return f"it takes 1 to 65535 rows that are not empty, not {tuple(x.shape)}"
    return _too_old(x.device)


@functools.cache
def _too_old(device: torch.device) -> str | None:
    old = device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)
    return "it needs compute capability 8.0 or newer" if old else None


@registry.register("ssd_scan", "triton", priority=30, unsupported=unsupported)
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
    """x, B and C are brought to the widest of their dtypes; y has x's. The gate is applied outside; ``chunk_size`` changes nothing here."""
    widest = torch.promote_types(torch.promote_types(x.dtype, B.dtype), C.dtype)
    u, B, C = (t.to(widest) for t in (x, B, C))
    D, dt_bias, initial_state = (None if t is None else t.float() for t in (D, dt_bias, initial_state))
    y, final, _ = forward(u, dt, A.float(), B, C, D, None, dt_bias, document_bounds(seq_idx), initial_state, chunk_size, *dt_limit)
    y = y.to(x.dtype) if z is None else (y.float() * F.silu(z.float())).to(x.dtype)
    return (y, final) if return_final_state else y


class _Call:
    """One call: sizes, operands as the kernels address them, what they share."""

    def __init__(self, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Any, dt_bias: Any, bounds: Any, limits: Any) -> None:
        self.x, self.B, self.C = (_addressable(t) for t in (x, B, C))
        if self.B.stride() != self.C.stride():  # they share their offsets
            self.B, self.C = self.B.contiguous(), self.C.contiguous()
        self.dt, self.limits = dt, limits
        self.A, self.D, self.bias = (None if t is None else t.contiguous() for t in (A, D, dt_bias))
        self.documents: tuple[Tensor | None, ...] = (None, None) if bounds is None else bounds.contiguous().unbind()
        self.batch, self.length, self.heads, self.headdim = x.shape
        self.groups, self.state = B.shape[2:]
        self.tuning = tuning(x, B)
        self.exact = x.dtype == torch.float32
        self.P, self.N = _block(self.headdim), _block(self.state)

    def flags(self) -> dict[str, Any]:
        """Constants of the kernels that multiply."""
        precision = "tf32x3" if self.exact else "tf32"
        return {"HAS_DOCUMENTS": self.documents[0] is not None, "EXACT": self.exact, "PRECISION": precision}

    def masked(self, rows: int, P: int, N: int) -> bool:
        """Whether tiles reach beyond the tensors."""
        return self.length % rows > 0 or self.headdim % P > 0 or self.state % N > 0

    def sizes(self) -> tuple[int, ...]:
        """Of the tensors, as most kernels take them."""
        return self.length, self.padded, self.heads, self.heads // self.groups, self.headdim, self.state, self.chunks

    def cut(self, chunk: int) -> None:
        """Computes steps and sums for chunks of that many steps."""
        from mamba_pretrain.ops import triton_ssd_kernels as kernels

        self.chunk, self.chunks = chunk, -(-self.length // chunk)
        self.padded = self.chunks * chunk
        new = self.x.new_empty
        vector = (self.batch, self.heads, self.padded)
        sums, sources, *low = new((4 if self.exact else 2, *vector), dtype=torch.float32)
        self.vectors = (*self.documents, sums, sources, *(low or (None, None)))
        launch(
            kernels.ssd_prepare, (self.chunks, -(-self.heads // PREPARE_HEADS), self.batch),
            self.dt, self.A, self.bias, *self.vectors,
            *self.dt.stride(), self.length, self.padded, self.heads, *self.limits,
            HAS_BIAS=self.bias is not None, HAS_DOCUMENTS=self.documents[0] is not None, EXACT=self.exact,
            CHUNK=chunk, HEADS=PREPARE_HEADS, num_warps=4,
        )  # fmt: skip

    def segments(self) -> tuple[int, int]:
        """How many parts of the length run in parallel (more than one only where batch and heads don't fill the device), and chunks in each."""
        wanted = min(2 * multiprocessors(self.x.device) // (self.batch * self.heads), self.length // SHORTEST_SEGMENT)
        each = -(-self.chunks // max(1, wanted))
        return -(-self.chunks // each), each

    def edges(self, reverse: bool, u: Tensor, edge: Tensor | None, segments: int, each: int) -> Tensor | None:
        """The states (or, in reverse, their gradients) that segments begin with, (b, segments, h, p, n); None for zero."""
        if segments == 1:
            return edge
        ends, decays = self.walk(reverse, u, None, segments, each)
        begin = torch.zeros_like(ends)
        order = range(segments - 1, -1, -1) if reverse else range(segments)
        before = begin[:, order[0]]
        if edge is not None:
            before.copy_(edge)
        for i in order[:-1]:
            following = begin[:, i - 1 if reverse else i + 1]
            torch.addcmul(ends[:, i], decays[:, i, :, None, None], before, out=following)
            before = following
        return begin

    def walk(
        self,
        reverse: bool,
        u: Tensor,
        edge: Tensor | None,
        segments: int,
        each: int,
        states: Tensor | None = None,
        before: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """``ssd_states``. Without ``states`` to write: where segments that begin with zero end up, and their decays; with, at the end of the
        reverse walk, where they end up, and the products of states ``before`` chunks with the gradients of those after them."""
        from mamba_pretrain.ops import triton_ssd_kernels as kernels

        t, new, write = self.tuning, self.x.new_empty, states is not None
        P = max(16, min(self.P, t.state_block // min(self.N, 128)))
        N = min(self.N, 128)
        blocks = -(-self.headdim // P), -(-self.state // N)
        end = new((self.batch, segments, self.heads, self.headdim, self.state) if reverse or not write else 0, dtype=torch.float32)
        decay = new((self.batch, segments, self.heads) if not write else 0, dtype=torch.float32)
        products = new((blocks[0] * blocks[1], self.batch, self.heads, self.chunks) if reverse and write else 0, dtype=torch.float32)
        V = self.C if reverse else self.B
        launch(
            kernels.ssd_states, (self.batch * segments * self.heads, blocks[0], blocks[1]),
            u, V, *self.vectors, edge, before, states, products, end, decay,
            *u.stride()[:3], *V.stride()[:3], *self.sizes(), segments, each,
            REVERSE=reverse, WRITE=write, STORE_END=reverse or not write, HAS_EDGE=edge is not None, MASKED=self.masked(self.chunk, P, N),
            CHUNK=self.chunk, P=P, WIDTH=self.headdim, N=N, **self.flags(), **t.states.options(),
        )  # fmt: skip
        return end, products if write else decay


def _block(size: int) -> int:
    """The power of two, at least 16, that a dimension is padded to."""
    return max(16, 1 << (size - 1).bit_length())


def _addressable(t: Tensor) -> Tensor:
    """With adjacent channels, and rows so close that offsets within a chunk have 32 bits; a copy only if it isn't so."""
    return t if t.stride(3) == 1 and t.stride(1) < 1 << 23 else t.contiguous()


def _outputs(x: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    final = x.new_empty((x.shape[0], *x.shape[2:], B.shape[3]), dtype=torch.float32)
    return x.new_empty(x.shape), final


def _kept(x: Tensor, initial_state: Tensor | None) -> Tensor:
    return x.new_empty(0, dtype=torch.float32) if initial_state is None else initial_state.clone()


_INPUTS = "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, Tensor? bounds"
_OPTIONS = "int chunk_size, float dt_min, float dt_max"


@operator(
    "triton_ssd_forward",
    schema=f"({_INPUTS}, Tensor? initial_state, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
)
def forward(x, dt, A, B, C, D, z, dt_bias, bounds, initial_state, chunk_size, dt_min, dt_max):  # type: ignore[no-untyped-def]
    """y (b, l, h, p), the final state (b, h, p, n) and a copy of the initial one; z must be None, chunk_size is for who counts FLOPs."""
    from mamba_pretrain.ops import triton_ssd_kernels as kernels

    with on_device_of(x):
        call = _Call(x, dt, A, B, C, D, dt_bias, bounds, (dt_min, dt_max))
        t = call.tuning
        call.cut(t.chunk)
        segments, each = call.segments()
        before = call.edges(False, call.x, None if initial_state is None else initial_state.contiguous(), segments, each)
        y, final = _outputs(x, B)
        P = max(16, min(call.P, t.state_block // call.N))
        launch(
            kernels.ssd_forward, (call.batch * segments * call.heads, -(-call.headdim // P), 1),
            call.x, call.B, call.C, call.D, *call.vectors, before, y, final,
            *call.x.stride()[:3], *call.B.stride()[:3], *call.sizes(), segments, each,
            HAS_D=D is not None, HAS_BEFORE=before is not None, MASKED=call.masked(t.chunk, P, call.N),
            CHUNK=t.chunk, P=P, N=call.N, **call.flags(), **t.forward.options(),
        )  # fmt: skip
        return y, final, _kept(x, initial_state)


@operator(
    "triton_ssd_backward",
    schema=f"(Tensor dy, Tensor? dfinal, {_INPUTS}, Tensor initial_state, {_OPTIONS})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def backward(  # type: ignore[no-untyped-def]
    dy, dfinal, x, dt, A, B, C, D, z, dt_bias, bounds, initial_state, chunk_size, dt_min, dt_max, gradient=beside.alone
):
    """Gradients of (x and B and C, dt, A, D, z, dt_bias, initial_state); those of absent inputs without meaning.

    ``gradient``: where that of dt goes.
    """
    with on_device_of(x):
        call = _Call(x, dt, A, B, C, D, dt_bias, bounds, (dt_min, dt_max))
        call.cut(call.tuning.tile * call.tuning.tiles)
        dy = dy.contiguous()  # as the kernels address it
        states, dstates, products, dinitial = _states(call, dy, initial_state.contiguous(), dfinal)
        return _gradients(call, dy, states, dstates, products, dinitial, gradient(dt))


def _states(call: _Call, dy: Tensor, initial_state: Tensor, dfinal: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """States before chunks and gradients of those after them, (b, chunks, h, n, p), their products, and the initial state's gradient."""
    segments, each = call.segments()
    states = call.x.new_empty((call.batch, call.chunks, call.heads, call.state, call.headdim))
    begin = call.edges(False, call.x, initial_state if initial_state.numel() else None, segments, each)
    call.walk(False, call.x, begin, segments, each, states)
    end = call.edges(True, dy, None if dfinal is None else dfinal.contiguous(), segments, each)
    dstates = torch.empty_like(states)
    first, products = call.walk(True, dy, end, segments, each, dstates, states)
    return states, dstates, products, first[:, 0] if segments == 1 else first[:, 0].contiguous()


def _gradients(
    call: _Call, dy: Tensor, states: Tensor, dstates: Tensor, products: Tensor, dinitial: Tensor, ddt: Tensor
) -> tuple[Tensor, ...]:
    from mamba_pretrain.ops import triton_ssd_backward_kernels as kernels

    t, x, B, C, new = call.tuning, call.x, call.B, call.C, call.x.new_empty
    dxBC = new_dxBC(x, B)
    row = dxBC.shape[2]

    def sums(*shape: int) -> Tensor:
        return new(shape, dtype=torch.float32)

    per_group = call.heads // call.groups
    parts = -(-per_group // t.heads)  # programs that share a group
    share = parts, -(-per_group // parts)
    pairs = t.tiles * (t.tiles + 1) // 2
    tiles = call.batch * call.chunks * t.tiles
    vector = (call.batch, call.heads, call.padded)
    shares, (taken, cross) = sums(*vector, 4), sums(2, *vector)
    dscores = sums(call.batch * call.chunks * call.groups * parts, pairs, t.tile, t.tile)
    shape = {"TILES": t.tiles, "TILE": t.tile, "P": call.P}
    launch(
        kernels.ssd_inside, (tiles * call.groups * parts, 1, 1),
        x, dy, B, C, call.D, *call.vectors, dstates, dxBC, dscores, shares, taken, cross,
        *x.stride()[:3], *B.stride()[:3], row, *call.sizes(), *share,
        HAS_D=call.D is not None, MASKED=call.masked(call.chunk, call.P, call.N), KEEP=t.keep,
        N=call.N, **shape, **call.flags(), **t.inside.options(),
    )  # fmt: skip
    N = min(call.N, 128)
    blocks = -(-call.state // N)
    from_states = sums(blocks, *vector)
    dB_parts, dC_parts = sums(2, tiles * call.groups * parts, t.tile, call.state)
    launch(
        kernels.ssd_edges, (2 * tiles * call.groups * parts, blocks, 1),
        x, dy, C, *call.vectors, states, dstates, dB_parts, dC_parts, from_states,
        *x.stride()[:3], *C.stride()[:3], taken.numel(), *call.sizes(), *share,
        MASKED=call.masked(call.chunk, call.P, N), N=N, **shape, **call.flags(), **t.edges.options(),
    )  # fmt: skip
    launch(
        kernels.ssd_gather, (2 * tiles * call.groups, blocks, 1),
        B, C, dscores, dB_parts, dC_parts, dxBC, *B.stride()[:3], row, call.length, call.groups, call.state, call.chunks, parts,
        TILES=t.tiles, TILE=t.tile, N=N, PRECISION=call.flags()["PRECISION"], num_warps=4,
    )  # fmt: skip
    by_chunk = sums(3, call.batch * call.chunks, call.heads)
    launch(
        kernels.ssd_finish, (call.batch * call.chunks, -(-call.heads // PREPARE_HEADS), 1),
        call.dt, call.A, call.bias, *call.documents, shares, taken, cross, from_states, products, ddt, by_chunk,
        *call.dt.stride(), ddt.stride(1), taken.numel(),
        call.batch, call.length, call.padded, call.heads, call.chunks, blocks, len(products), *call.limits,
        HAS_BIAS=call.bias is not None, HAS_D=call.D is not None, HAS_DOCUMENTS=call.documents[0] is not None,
        TILES=t.tiles, TILE=t.tile, HEADS=PREPARE_HEADS, num_warps=4,
    )  # fmt: skip
    dA, dbias, dD = by_chunk.sum(1).unbind()
    return dxBC, ddt, dA, dD.clone(), new(0), dbias.clone(), dinitial


@forward.register_fake
def _(x, dt, A, B, C, D, z, dt_bias, bounds, initial_state, chunk_size, dt_min, dt_max):  # type: ignore[no-untyped-def]
    return *_outputs(x, B), _kept(x, initial_state)


@backward.register_fake
def _(dy, dfinal, x, dt, A, B, C, D, z, dt_bias, bounds, initial_state, chunk_size, dt_min, dt_max):  # type: ignore[no-untyped-def]
    per_head = [torch.empty_like(A) for _ in range(3)]
    return new_dxBC(x, B), dt.new_empty(dt.shape), *per_head[:2], x.new_empty(0), per_head[2], _outputs(x, B)[1]


register_gradients(forward, backward, beside=True, gradient=beside.gradient_of)
