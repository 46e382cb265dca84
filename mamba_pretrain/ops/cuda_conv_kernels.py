"""Launches of the convolution's kernels: argument structs, specialisation, tuning. The sources are ``cuda_src/conv*``."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from mamba_pretrain.ops import nvrtc
from mamba_pretrain.ops.cuda_scan_kernels import SCALAR_TYPES, whole_vectors
from mamba_pretrain.ops.kernel_arguments import Rows, fields, pointer, rows, struct

MAX_TAPS = 8
MAX_LENGTH = 2**30  # steps are counted in 32 bits
REDUCE_BLOCK = 256  # threads, as in conv_reduce.cu


@dataclass(frozen=True)
class Tuning:
    """One way to run a kernel: channels a lane (2 or 4, or 8 with 16-bit activations; 1 where rows don't allow vectors), steps a warp, rows
    asked for ahead, warps a block, and blocks that a multiprocessor should hold (what caps the registers)."""

    channels: int
    chunk: int
    ahead: int
    warps: int
    min_blocks: int

    @property
    def covered(self) -> int:
        """Steps a block."""
        return self.chunk * self.warps


# For compute capability 9.0 and 16-bit activations, the fastest of those tried on an H100. Elsewhere PORTABLE, which caps nothing.
HOPPER = {"conv_forward": Tuning(4, 64, 8, 4, 4), "conv_backward": Tuning(4, 64, 4, 4, 4)}
PORTABLE = {"conv_forward": Tuning(4, 64, 4, 4, 1), "conv_backward": Tuning(4, 64, 4, 4, 1)}


@functools.cache
def tuning(name: str, dtype: torch.dtype, device: int) -> Tuning:
    """How a kernel runs on a device."""
    hopper = torch.cuda.get_device_capability(device) == (9, 0)
    return (HOPPER if hopper and dtype != torch.float32 else PORTABLE)[name]


# -- argument structs, as in the sources --------------------------------------------------------------------------------------------------

ConvParams = struct(
    "ConvParams",
    **fields("x dy dx", Rows),
    **fields("weight bias seq_idx history y dhistory sums", ctypes.c_void_p),
    **fields("length channels", ctypes.c_int),
)
ConvReduceParams = struct("ConvReduceParams", **fields("sums dweight dbias", ctypes.c_void_p), **fields("parts channels", ctypes.c_int))


# -- launches -----------------------------------------------------------------------------------------------------------------------------


@dataclass
class Operands:
    """Inputs as the kernels take them: x (b, l, d) with adjacent channels; weight (d, w) and bias (d,) fp32, seq_idx (b, l) int32 and
    history (b, w - 1, d) of x's dtype, contiguous."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    seq_idx: Tensor | None
    history: Tensor | None
    silu: bool

    def __post_init__(self) -> None:
        self.weight = on_16_bytes(self.weight)
        self.bias = None if self.bias is None else on_16_bytes(self.bias)

    def launch(
        self,
        name: str,
        tuned: Tuning,
        dy: Tensor | None = None,
        y: Tensor | None = None,
        dx: Tensor | None = None,
        dhistory: Tensor | None = None,
        sums: Tensor | None = None,
    ) -> None:
        """Runs a pass."""
        batch, length, channels = self.x.shape
        vector = whole_vectors(channels, self.x, dy, dx, self.history)
        lane_channels = tuned.channels if vector else 1
        specialised = (self.weight.shape[1], lane_channels, self.seq_idx is not None, self.silu)
        kernel = _kernel(name, tuned, self.x.dtype, *specialised, self.x.device.index)
        pointers = map(pointer, (self.weight, self.bias, self.seq_idx, self.history, y, dhistory, sums))
        params = ConvParams(rows(self.x), rows(dy), rows(dx), *pointers, length, channels)
        kernel((-(-channels // (32 * lane_channels)), -(-length // tuned.covered), batch), params)


def on_16_bytes(parameter: Tensor) -> Tensor:
    """A parameter that vectors can be loaded from; a copy only if it begins elsewhere, as a slice of a larger buffer may."""
    return parameter if parameter.data_ptr() % 16 == 0 else parameter.clone()


@functools.cache
def _kernel(name: str, tuned: Tuning, dtype: torch.dtype, taps: int, channels: int, has_seq: bool, silu: bool, device: int) -> nvrtc.Kernel:
    macros = {
        "SCALAR_TYPE": SCALAR_TYPES[dtype],
        "TAPS": taps,
        "CHANNELS": channels,
        "CHUNK_STEPS": tuned.chunk,
        "AHEAD": tuned.ahead,
        "WARPS": tuned.warps,
        "MIN_BLOCKS": tuned.min_blocks,
        "HAS_SEQ": int(has_seq),
        "SILU": int(silu),
    }
    return nvrtc.kernel(f"{name}.cu", macros, 32 * tuned.warps, device)


@functools.cache
def _reduce_kernel(taps: int, device: int) -> nvrtc.Kernel:
    return nvrtc.kernel("conv_reduce.cu", {"SCALAR_TYPE": 0, "TAPS": taps}, REDUCE_BLOCK, device)


def forward(ops: Operands) -> Tensor:
    """y (b, l, d)."""
    y = torch.empty(ops.x.shape, dtype=ops.x.dtype, device=ops.x.device)
    ops.launch("conv_forward", tuning("conv_forward", ops.x.dtype, ops.x.device.index), None, y=y)
    return y


def backward(ops: Operands, dy: Tensor, dx: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x (written into ``dx`` if given), weight (d, w), bias (d,) and history (empty if absent). dy, dx (b, l, d) with adjacent
    channels."""
    batch, length, channels = ops.x.shape
    taps, device = ops.weight.shape[1], ops.x.device
    dx = torch.empty(ops.x.shape, dtype=ops.x.dtype, device=device) if dx is None else dx
    tuned = tuning("conv_backward", ops.x.dtype, device.index)
    dhistory = torch.empty_like(ops.history) if ops.history is not None else ops.x.new_empty(0)
    parts = batch * -(-length // tuned.covered)
    sums = torch.empty(parts, taps + 1, channels, dtype=torch.float32, device=device)
    ops.launch("conv_backward", tuned, dy, dx=dx, dhistory=dhistory if ops.history is not None else None, sums=sums)
    dweight = torch.empty(channels, taps, dtype=torch.float32, device=device)
    dbias = torch.empty(channels, dtype=torch.float32, device=device)
    reduce = _reduce_kernel(taps, device.index)
    reduce((-(-channels * (taps + 1) // 32), 1, 1), ConvReduceParams(*map(pointer, (sums, dweight, dbias)), parts, channels))
    return dx, dweight, dbias, dhistory
