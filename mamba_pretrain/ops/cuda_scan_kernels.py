"""Launches of the selective scan's kernels: argument structs, specialisation, tuning, working memory.

The sources are ``cuda_src/scan_*.cu``; ``docs/kernels.md`` explains the algorithm and the figures behind the tuning table.
"""

from __future__ import annotations

import ctypes
import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mamba_pretrain.ops import nvrtc
from mamba_pretrain.ops.kernel_arguments import Rows, fields, pointer, rows, struct

STATES = (8, 16, 32, 64)
TILE = 16  # steps between checkpoints, as in scan.cuh
SCALAR_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
SHORTEST_SEGMENT = 256  # steps; below that what segments cost outweighs what they bring
# Bytes of shared memory: of a Hopper multiprocessor, what every block takes beside its own, and what a block may have on every GPU from 8.0 on.
HOPPER_SHARED, RESERVED_SHARED, MOST_SHARED = 228 * 1024, 1024, 99 * 1024


# -- tuning -------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tuning:
    """One way to run a kernel: channels a quad of lanes (with 16 states or fewer; less with more), warps that a multiprocessor holds,
    block sizes to choose from in warps, how much a warp's channel costs, every n-th decay on the FMA pipe (0: none), and with how many states
    at most registers suffice."""

    lane_channels: int
    resident: int
    warps: tuple[int, ...]
    cost: float = 1.0
    polynomial_every: int = 0
    most_states: int = STATES[-1]


# Measured on an H100 (docs/kernels.md) with 16-bit activations. Elsewhere PORTABLE is used: blocks that fit in 99 KiB of shared memory.
# Beside 16 states or fewer nothing was timed: larger blocks, which share B and C, let as many warps be resident.
HOPPER = {
    "scan_forward": (Tuning(2, 16, (4,), polynomial_every=8, most_states=16), Tuning(2, 16, (8,), cost=1.05, polynomial_every=8)),
    "scan_carry": (Tuning(4, 8, (4,)),),
    "scan_backward": (
        Tuning(4, 8, (4, 8), most_states=32),
        Tuning(2, 12, (4, 12), cost=1.15, most_states=16),
        Tuning(4, 8, (8,), cost=1.05),
    ),
}
PORTABLE = {
    "scan_forward": (Tuning(2, 8, (4,), most_states=32), Tuning(2, 8, (2,), cost=1.05)),
    "scan_carry": (Tuning(2, 8, (2,)),),
    "scan_backward": (Tuning(4, 4, (2,)),),
}
# Time of the pass that finds what segments carry, as a share of the pass over them.
CARRY_COST = 0.5
SCHEDULERS = 4  # of a multiprocessor; each runs its own warps


@dataclass(frozen=True, eq=False)  # `shape` gives the same object for the same question: it is found by identity
class Shape:
    """A kernel's blocks: channels a quad, warps, blocks that fit on a multiprocessor, the grid over channels, segments of the length, and the bytes
    of shared memory that a block may have."""

    lane_channels: int
    warps: int
    min_blocks: int
    polynomial_every: int
    blocks: int
    segments: int
    most_shared: int = MOST_SHARED


def most_shared(min_blocks: int, hopper: bool) -> int:
    """Bytes of shared memory that a block may have, of which so many share a multiprocessor where the kernel is tuned."""
    return HOPPER_SHARED // min_blocks - RESERVED_SHARED if hopper else MOST_SHARED


@functools.cache
def shape(kernel: str, device: int, dtype: torch.dtype, batch: int, length: int, channels: int, states: int) -> Shape:
    """The cheapest shape, by the steps that the busiest scheduler of the device must do.

    Checkpoints are in the order of the backward kernel's quads, so the forward kernel's have no more channels than those.
    """
    properties = torch.cuda.get_device_properties(device)
    processors, hopper = properties.multi_processor_count, (properties.major, properties.minor) == (9, 0)
    best, best_cost = None, math.inf
    tuned_for_it = hopper and dtype != torch.float32
    for tuned in (HOPPER if tuned_for_it else PORTABLE)[kernel]:
        if states > tuned.most_states:
            continue
        per_quad = min(tuned.lane_channels, max(1, 64 // states))
        if kernel == "scan_forward" and per_quad > shape("scan_backward", device, dtype, batch, length, channels, states).lane_channels:
            continue
        for warps in tuned.warps:
            blocks = -(-channels // (warps * 8 * per_quad))
            free = tuned.resident * processors // (batch * blocks * warps)
            segments = max(1, min(free, length // SHORTEST_SEGMENT)) if free >= 3 else 1
            busiest = -(-batch * blocks * segments // processors) * warps
            cost = -(-busiest // SCHEDULERS) * per_quad * tuned.cost / segments * (1 + CARRY_COST * (segments > 1))
            if cost < best_cost:
                min_blocks = max(1, tuned.resident // warps)
                limit = most_shared(min_blocks, tuned_for_it)
                best, best_cost = Shape(per_quad, warps, min_blocks, tuned.polynomial_every, blocks, segments, limit), cost
    assert best is not None
    return best


# -- argument structs, as in the sources --------------------------------------------------------------------------------------------------


class Segments(NamedTuple):
    """How the length is cut."""

    count: int  # type: ignore[assignment]  # what tuples call so is of no use here
    length: int


_GEOMETRY = fields("length channels segments_count segments_length", ctypes.c_int)
ForwardParams = struct(
    "ForwardParams",
    **fields("u delta z B C", Rows),
    **fields("y A D delta_bias seq_idx initial final_state checkpoints", ctypes.c_void_p),
    **_GEOMETRY,
)
CarryParams = struct(
    "CarryParams", **fields("values delta z BC", Rows), **fields("A delta_bias seq_idx carry delta_sum", ctypes.c_void_p), **_GEOMETRY
)
JoinParams = struct(
    "JoinParams", **fields("A delta_sum carry outer received", ctypes.c_void_p), **fields("batch channels segments reverse", ctypes.c_int)
)
BackwardParams = struct(
    "BackwardParams",
    **fields("u delta z B C dout", Rows),
    **fields("du ddelta dz A D delta_bias seq_idx checkpoints dreceived dinitial dBC dA dD dbias", ctypes.c_void_p),
    **_GEOMETRY,
)
ReduceParams = struct(
    "ReduceParams",
    **fields("dBC dB dC dA_parts dD_parts dbias_parts dA dD dbias", ctypes.c_void_p),
    **fields("batch blocks length rows channels bc_grid", ctypes.c_int),
)


# -- operands -----------------------------------------------------------------------------------------------------------------------------


@dataclass
class Operands:
    """Inputs as the kernels take them: one dtype, adjacent channels; A, D, delta_bias fp32 and seq_idx int32, contiguous."""

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    delta_bias: Tensor | None
    seq_idx: Tensor | None

    def __post_init__(self) -> None:
        self.batch, self.length, self.channels = self.u.shape
        self.states = self.A.shape[1]
        self.device = self.u.device
        self.tiles = -(-self.length // TILE)

    def new(self, *shape: int) -> Tensor:
        """Uninitialised fp32 working memory."""
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def shape(self, kernel: str) -> Shape:
        """How a kernel runs for these operands."""
        return shape(kernel, self.device.index, self.u.dtype, self.batch, self.length, self.channels, self.states)

    def cut(self, count: int) -> Segments:
        """The length in about ``count`` segments."""
        length = TILE * -(-self.tiles // count)
        return Segments(-(-self.length // length), length)

    def kernel(self, name: str, values: Tensor | None = None, reverse: int = 0, gate_row: int = 1) -> nvrtc.Kernel:
        """A kernel specialised for these operands. ``values``: an activation that it reads beside u, delta and z."""
        vector_io = whole_vectors(self.channels, self.u, self.delta, self.z, values)
        vector_bc = whole_vectors(self.states, self.B, self.C)
        present = (self.z is not None, self.seq_idx is not None)
        return _kernel(name, self.shape(name), self.shape("scan_backward"), self._kind(), *present, vector_io, vector_bc, reverse, gate_row)

    def plain_kernel(self, name: str) -> nvrtc.Kernel:
        """A kernel that has a thread for each result: of 256 threads a block, specialised for dtype and states only."""
        return _plain_kernel(name, self._kind())

    def _kind(self) -> tuple[torch.dtype, int, int]:
        return self.u.dtype, self.states, self.device.index


@functools.cache
def _kernel(
    name: str,
    shape: Shape,
    backward: Shape,
    kind: tuple[torch.dtype, int, int],
    has_z: bool,
    has_seq: bool,
    vector_io: bool,
    vector_bc: bool,
    reverse: int,
    gate_row: int,
) -> nvrtc.Kernel:
    dtype, states, device = kind
    macros = {
        "SCALAR_TYPE": SCALAR_TYPES[dtype],
        "STATES": states,
        "LANE_CHANNELS": shape.lane_channels,
        "TWIST_CHANNELS": backward.lane_channels,
        "HAS_Z": int(has_z),
        "HAS_SEQ": int(has_seq),
        "VECTOR_IO": int(vector_io),
        "VECTOR_BC": int(vector_bc),
        "WARPS": shape.warps,
        "MIN_BLOCKS": shape.min_blocks,
        "POLYNOMIAL_EVERY": shape.polynomial_every,
        "REVERSE": reverse,
        "GATE_ROW": gate_row,
        "MOST_SHARED": shape.most_shared,
    }
    return nvrtc.kernel(f"{name}.cu", macros, 32 * shape.warps, device)


@functools.cache
def _plain_kernel(name: str, kind: tuple[torch.dtype, int, int]) -> nvrtc.Kernel:
    dtype, states, device = kind
    macros = dict.fromkeys(("HAS_Z", "HAS_SEQ", "VECTOR_IO", "VECTOR_BC", "POLYNOMIAL_EVERY"), 0)
    macros |= dict.fromkeys(("LANE_CHANNELS", "TWIST_CHANNELS", "WARPS", "MIN_BLOCKS"), 1) | {"MOST_SHARED": MOST_SHARED}
    return nvrtc.kernel(f"{name}.cu", {**macros, "SCALAR_TYPE": SCALAR_TYPES[dtype], "STATES": states}, 256, device)


def warm_up(
    dtype: torch.dtype, batch: int, length: int, channels: int, states: int, device: int, has_z: bool = True, has_seq: bool = True
) -> None:
    """Compiles and loads what calls of this size need, so that the first of them does not wait (it is no part of a timed step)."""

    def geometry(name: str) -> Shape:
        return shape(name, device, dtype, batch, length, channels, states)

    kind, wide = (dtype, states, device), channels % 8 == 0
    for name in ("scan_forward", "scan_backward"):
        reverse = name == "scan_backward"
        # In a model z is half of a projection's output, and so is its gradient of that output's.
        gate_row = 2 if reverse and has_z else 1
        _kernel(name, geometry(name), geometry("scan_backward"), kind, has_z, has_seq, wide, True, 0, gate_row)
        if geometry(name).segments > 1:
            _kernel("scan_carry", geometry("scan_carry"), geometry("scan_backward"), kind, has_z, has_seq, wide, True, int(reverse), 1)
            _plain_kernel("scan_join", kind)
    _plain_kernel("scan_reduce", kind)


def whole_vectors(width: int, *tensors: Tensor | None) -> bool:
    """Whether every row begins on 16 bytes and holds whole 16-byte chunks."""
    found = width
    chunk = 1
    for t in tensors:
        if t is not None:
            chunk = 16 // t.element_size()
            if t.data_ptr() % 16:
                return False
            found |= t.stride(0) | t.stride(1)
    return found % chunk == 0


def _join(ops: Operands, segments: Segments, carry: Tensor, delta_sum: Tensor, outer: Tensor | None, reverse: bool) -> Tensor:
    received = ops.new(ops.batch, segments.count, ops.channels, ops.states)
    params = JoinParams(*map(pointer, (ops.A, delta_sum, carry, outer, received)), ops.batch, ops.channels, segments.count, int(reverse))
    ops.plain_kernel("scan_join")((math.ceil(ops.batch * ops.channels * ops.states / 256), 1, 1), params)
    return received


def received_by_segments(ops: Operands, segments: Segments, values: Tensor, outer: Tensor | None, reverse: bool) -> Tensor | None:
    """What each segment receives (batch, segments, channels, states); ``outer`` itself if there is only one."""
    if segments.count == 1:
        return outer
    links = segments.count - 1
    carry = ops.new(ops.batch, links, ops.channels, ops.states)
    delta_sum = ops.new(ops.batch, links, ops.channels)
    params = CarryParams(
        *map(rows, (values, ops.delta, ops.z, ops.C if reverse else ops.B)),
        *map(pointer, (ops.A, ops.delta_bias, ops.seq_idx, carry, delta_sum)),
        ops.length,
        ops.channels,
        *segments,
    )
    kernel = ops.kernel("scan_carry", values, int(reverse))
    kernel((ops.shape("scan_carry").blocks, ops.batch, links), params)
    return _join(ops, segments, carry, delta_sum, outer, reverse)


# -- the two passes -----------------------------------------------------------------------------------------------------------------------


def forward(ops: Operands, initial: Tensor | None, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """y (b, l, d), the final state (b, d, n) and, if ``save``, the states before tiles (b, tiles, d, n), else an empty tensor."""
    y = torch.empty(ops.u.shape, dtype=ops.u.dtype, device=ops.device)
    final = ops.new(ops.batch, ops.channels, ops.states)
    checkpoints = ops.new(ops.batch, ops.tiles, ops.channels, ops.states) if save else ops.new(0)
    shape = ops.shape("scan_forward")
    segments = ops.cut(shape.segments)
    received = received_by_segments(ops, segments, ops.u, initial, reverse=False)
    params = ForwardParams(
        *map(rows, (ops.u, ops.delta, ops.z, ops.B, ops.C)),
        *map(pointer, (y, ops.A, ops.D, ops.delta_bias, ops.seq_idx, received, final, checkpoints if save else None)),
        ops.length,
        ops.channels,
        *segments,
    )
    ops.kernel("scan_forward")((shape.blocks, ops.batch, segments.count), params)
    return y, final, checkpoints


@dataclass
class Gradients:
    """Gradients of the op's inputs; absent inputs have empty ones."""

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
    def empty(cls, ops: Operands, dz: Tensor | None) -> Gradients:
        """Uninitialised memory; the kernels write every element."""
        activation = functools.partial(torch.empty, dtype=ops.u.dtype, device=ops.device)
        return cls(
            u=activation(ops.u.shape),
            delta=activation(ops.u.shape),
            A=ops.new(ops.channels, ops.states),
            B=activation(ops.B.shape),
            C=activation(ops.C.shape),
            D=ops.new(ops.channels),
            z=activation(0) if dz is None else dz,
            delta_bias=ops.new(ops.channels),
            initial=ops.new(ops.batch, ops.channels, ops.states),
        )

    def in_order(self) -> tuple[Tensor, ...]:
        """As the backward op returns them."""
        return self.u, self.delta, self.A, self.B, self.C, self.D, self.z, self.delta_bias, self.initial


def gate_row(dz: Tensor | None) -> int | None:
    """How many times as long as ``dz`` (b, l, d) the rows are that it is a part of; None if its rows are not evenly spaced by such a number."""
    if dz is None:
        return 1
    _, length, channels = dz.shape
    times = dz.stride(1) // channels
    return times if dz.stride() == (length * times * channels, times * channels, 1) else None


def backward(ops: Operands, dout: Tensor, dfinal: Tensor | None, checkpoints: Tensor, dz: Tensor | None = None) -> Gradients:
    """Gradients from those of y and of the final state; that of z is written into ``dz`` if given. Raises ValueError if ``gate_row`` does not
    know its rows."""
    if dz is None and ops.z is not None:
        dz = torch.empty(ops.z.shape, dtype=ops.z.dtype, device=ops.device)
    if (row := gate_row(dz)) is None:
        raise ValueError("the rows of dz are not those of a tensor whose width is a multiple of dz's")
    grads = Gradients.empty(ops, dz)
    shape = ops.shape("scan_backward")
    segments = ops.cut(shape.segments)
    received = received_by_segments(ops, segments, dout, dfinal, reverse=True)
    blocks, parts = shape.blocks, ops.batch * segments.count
    dBC = ops.new(ops.batch, blocks, 2, ops.length, ops.states)
    dA, dD, dbias = ops.new(parts, ops.channels, ops.states), ops.new(parts, ops.channels), ops.new(parts, ops.channels)
    params = BackwardParams(
        *map(rows, (ops.u, ops.delta, ops.z, ops.B, ops.C, dout)),
        *map(
            pointer,
            (
                grads.u,
                grads.delta,
                grads.z,
                ops.A,
                ops.D,
                ops.delta_bias,
                ops.seq_idx,
                checkpoints,
                received,
                grads.initial,
                dBC,
                dA,
                dD,
                dbias,
            ),
        ),
        ops.length,
        ops.channels,
        *segments,
    )
    ops.kernel("scan_backward", dout, gate_row=row)((blocks, ops.batch, segments.count), params)
    bc_grid = math.ceil(ops.batch * ops.length * ops.states * 2 / 4 / 256)
    others = math.ceil(ops.channels * (ops.states + 2) / 256)
    sums = ReduceParams(
        *map(pointer, (dBC, grads.B, grads.C, dA, dD, dbias, grads.A, grads.D, grads.delta_bias)),
        ops.batch,
        blocks,
        ops.length,
        parts,
        ops.channels,
        bc_grid,
    )
    ops.plain_kernel("scan_reduce")((bc_grid + others, 1, 1), sums)
    return grads
