"""Launches of the selective scan's kernels: argument structs, specialisation, tuning, working memory.

The sources are ``cuda_src/scan_*.cu``; ``docs/kernels.md`` explains the algorithm and the figures behind the tuning table.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mamba_pretrain.ops import nvrtc

STATES = (8, 16, 32, 64)
TILE = 16  # steps between checkpoints, as in scan.cuh
SCALAR_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
SHORTEST_SEGMENT = 256  # steps; below that what segments cost outweighs what they bring


# -- tuning -------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tuning:
    """Shape of a kernel's blocks: warps a block, blocks that must fit on a multiprocessor, channels a quad of lanes (with 16 states or fewer;
    in proportion with more), every n-th decay on the FMA pipe (0: none)."""

    warps: int
    min_blocks: int
    lane_channels: int = 4
    polynomial_every: int = 0


# Measured on an H100 (docs/kernels.md). Elsewhere PORTABLE is used: blocks small enough for 99 KiB of shared memory.
HOPPER = {"scan_forward": Tuning(4, 4, 2), "scan_carry": Tuning(4, 4, 2), "scan_backward": Tuning(4, 2)}
PORTABLE = {"scan_forward": Tuning(2, 2, 2), "scan_carry": Tuning(2, 2, 2), "scan_backward": Tuning(2, 1)}


def tuning(kernel: str, capability: tuple[int, int], dtype: torch.dtype) -> Tuning:
    """Block shape of a kernel; the measured table covers 16-bit activations on compute capability 9.0."""
    return (HOPPER if capability == (9, 0) and dtype != torch.float32 else PORTABLE)[kernel]


def lane_channels(tuned: Tuning, states: int) -> int:
    """Channels of a quad of lanes: with more states fewer, so that they stay in registers."""
    return min(tuned.lane_channels, max(1, 64 // states))


# -- argument structs, as in the sources --------------------------------------------------------------------------------------------------


class Rows(ctypes.Structure):
    """A (batch, length, channels) tensor with adjacent channels."""

    _fields_ = (("data", ctypes.c_void_p), ("batch_stride", ctypes.c_longlong), ("row_stride", ctypes.c_longlong))


class Segments(ctypes.Structure):
    """How the length is cut."""

    _fields_ = (("count", ctypes.c_int), ("length", ctypes.c_int))


def _struct(name: str, **fields: type) -> Any:
    return type(name, (ctypes.Structure,), {"_fields_": tuple(fields.items())})


def _fields(names: str, kind: type) -> dict[str, type]:
    return dict.fromkeys(names.split(), kind)


_GEOMETRY = {**_fields("length channels", ctypes.c_int), "segments": Segments}
ForwardParams = _struct(
    "ForwardParams",
    **_fields("u delta z B C y", Rows),
    **_fields("A D delta_bias seq_idx initial final_state checkpoints", ctypes.c_void_p),
    **_GEOMETRY,
)
CarryParams = _struct(
    "CarryParams", **_fields("values delta z BC", Rows), **_fields("A delta_bias seq_idx carry delta_sum", ctypes.c_void_p), **_GEOMETRY
)
JoinParams = _struct(
    "JoinParams", **_fields("A delta_sum carry outer received", ctypes.c_void_p), **_fields("batch channels segments reverse", ctypes.c_int)
)
BackwardParams = _struct(
    "BackwardParams",
    **_fields("u delta z B C dout du ddelta dz", Rows),
    **_fields("A D delta_bias seq_idx checkpoints dreceived dinitial dBC dA dD dbias", ctypes.c_void_p),
    **_GEOMETRY,
)
ReduceParams = _struct(
    "ReduceParams",
    **_fields("dBC dB dC dA_parts dD_parts dbias_parts dA dD dbias", ctypes.c_void_p),
    **_fields("batch blocks length rows channels bc_grid", ctypes.c_int),
)


def _rows(tensor: Tensor | None) -> Rows:
    if tensor is None:
        return Rows()
    return Rows(tensor.data_ptr(), tensor.stride(0), tensor.stride(1))


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


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

    def grid(self, tuned: Tuning) -> int:
        """Blocks that cover the channels."""
        return -(-self.channels // (tuned.warps * 8 * lane_channels(tuned, self.states)))

    def segments(self, kernel: str) -> Segments:
        """One segment if batch and channels fill the device, else enough to."""
        tuned = self.tuned(kernel)
        blocks, room = self.grid(tuned) * self.batch, _device(self.device.index)[1] * tuned.min_blocks
        count = 1 if 3 * blocks > room else min(room // blocks, self.length // SHORTEST_SEGMENT)
        length = TILE * -(-self.tiles // max(1, count))
        return Segments(-(-self.length // length), length)

    def tuned(self, kernel: str) -> Tuning:
        """Block shape for these operands."""
        return tuning(kernel, _device(self.device.index)[0], self.u.dtype)

    def kernel(self, name: str, rows: Iterable[Tensor | None], **macros: int) -> nvrtc.Kernel:
        """A kernel specialised for these operands. ``rows``: all activations that it reads or writes beside u and delta."""
        tuned = self.tuned(name) if name in HOPPER else Tuning(8, 1)
        specialised = {
            "SCALAR_TYPE": SCALAR_TYPES[self.u.dtype],
            "STATES": self.states,
            "HAS_Z": int(self.z is not None),
            "HAS_SEQ": int(self.seq_idx is not None),
            "VECTOR_IO": int(_whole_vectors(self.channels, self.u, self.delta, self.z, *rows)),
            "VECTOR_BC": int(_whole_vectors(self.states, self.B, self.C)),
            "LANE_CHANNELS": lane_channels(tuned, self.states),
            "WARPS": tuned.warps,
            "MIN_BLOCKS": tuned.min_blocks,
            "POLYNOMIAL_EVERY": tuned.polynomial_every,
            **macros,
        }
        return nvrtc.kernel(f"{name}.cu", specialised, 32 * tuned.warps, self.device.index)


@functools.cache
def _device(index: int) -> tuple[tuple[int, int], int]:
    properties = torch.cuda.get_device_properties(index)
    return (properties.major, properties.minor), properties.multi_processor_count


def _whole_vectors(width: int, *tensors: Tensor | None) -> bool:
    """Whether every row begins on 16 bytes and holds whole 16-byte chunks."""
    present = [t for t in tensors if t is not None]
    chunk = 16 // present[0].element_size()
    return width % chunk == 0 and all(t.data_ptr() % 16 == 0 and t.stride(0) % chunk == 0 and t.stride(1) % chunk == 0 for t in present)


def _join(ops: Operands, carry: Tensor, delta_sum: Tensor, outer: Tensor | None, reverse: bool) -> Tensor:
    received = torch.empty_like(carry)
    params = JoinParams(*map(_pointer, (ops.A, delta_sum, carry, outer, received)), ops.batch, ops.channels, carry.shape[1], int(reverse))
    ops.kernel("scan_join", ())((math.ceil(ops.batch * ops.channels * ops.states / 256), 1, 1), params)
    return received


def _received(ops: Operands, segments: Segments, values: Tensor, outer: Tensor | None, reverse: bool) -> Tensor | None:
    """What each segment receives (batch, segments, channels, states); ``outer`` itself if there is only one."""
    if segments.count == 1:
        return outer
    carry = ops.new(ops.batch, segments.count, ops.channels, ops.states)
    delta_sum = ops.new(ops.batch, segments.count, ops.channels)
    params = CarryParams(
        *map(_rows, (values, ops.delta, ops.z, ops.C if reverse else ops.B)),
        *map(_pointer, (ops.A, ops.delta_bias, ops.seq_idx, carry, delta_sum)),
        ops.length,
        ops.channels,
        segments,
    )
    kernel = ops.kernel("scan_carry", (values,), REVERSE=int(reverse))
    kernel((ops.grid(ops.tuned("scan_carry")), ops.batch, segments.count), params)
    return _join(ops, carry, delta_sum, outer, reverse)


# -- the two passes -----------------------------------------------------------------------------------------------------------------------


def forward(ops: Operands, initial: Tensor | None, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """y (b, l, d), the final state (b, d, n) and, if ``save``, the states before tiles (b, tiles, d, n), else an empty tensor."""
    y = torch.empty(ops.u.shape, dtype=ops.u.dtype, device=ops.device)
    final = ops.new(ops.batch, ops.channels, ops.states)
    checkpoints = ops.new(ops.batch, ops.tiles, ops.channels, ops.states) if save else ops.new(0)
    segments = ops.segments("scan_forward")
    received = _received(ops, segments, ops.u, initial, reverse=False)
    params = ForwardParams(
        *map(_rows, (ops.u, ops.delta, ops.z, ops.B, ops.C, y)),
        *map(_pointer, (ops.A, ops.D, ops.delta_bias, ops.seq_idx, received, final, checkpoints if save else None)),
        ops.length,
        ops.channels,
        segments,
    )
    ops.kernel("scan_forward", ())((ops.grid(ops.tuned("scan_forward")), ops.batch, segments.count), params)
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
    def empty(cls, ops: Operands) -> Gradients:
        """Uninitialised memory; the kernels write every element."""
        activation = functools.partial(torch.empty, dtype=ops.u.dtype, device=ops.device)
        return cls(
            u=activation(ops.u.shape),
            delta=activation(ops.u.shape),
            A=ops.new(ops.channels, ops.states),
            B=activation(ops.B.shape),
            C=activation(ops.C.shape),
            D=ops.new(ops.channels),
            z=activation(ops.u.shape if ops.z is not None else 0),
            delta_bias=ops.new(ops.channels),
            initial=ops.new(ops.batch, ops.channels, ops.states),
        )

    def in_order(self) -> tuple[Tensor, ...]:
        """As the backward op returns them."""
        return self.u, self.delta, self.A, self.B, self.C, self.D, self.z, self.delta_bias, self.initial


def backward(ops: Operands, dout: Tensor, dfinal: Tensor | None, checkpoints: Tensor) -> Gradients:
    """Gradients from those of y and of the final state."""
    grads = Gradients.empty(ops)
    segments = ops.segments("scan_backward")
    received = _received(ops, segments, dout, dfinal, reverse=True)
    blocks, rows = ops.grid(ops.tuned("scan_backward")), ops.batch * segments.count
    dBC = ops.new(ops.batch, blocks, 2, ops.length, ops.states)
    dA, dD, dbias = ops.new(rows, ops.channels, ops.states), ops.new(rows, ops.channels), ops.new(rows, ops.channels)
    params = BackwardParams(
        *map(_rows, (ops.u, ops.delta, ops.z, ops.B, ops.C, dout, grads.u, grads.delta, grads.z if ops.z is not None else None)),
        *map(_pointer, (ops.A, ops.D, ops.delta_bias, ops.seq_idx, checkpoints, received, grads.initial, dBC, dA, dD, dbias)),
        ops.length,
        ops.channels,
        segments,
    )
    ops.kernel("scan_backward", (dout,))((blocks, ops.batch, segments.count), params)
    bc_grid = math.ceil(ops.batch * ops.length * ops.states * 2 / 4 / 256)
    others = math.ceil(ops.channels * (ops.states + 2) / 256)
    sums = ReduceParams(
        *map(_pointer, (dBC, grads.B, grads.C, dA, dD, dbias, grads.A, grads.D, grads.delta_bias)),
        ops.batch,
        blocks,
        ops.length,
        rows,
        ops.channels,
        bc_grid,
    )
    ops.kernel("scan_reduce", ())((bc_grid + others, 1, 1), sums)
    return grads
