"""Matrices in 8-bit floating point with the scales they were divided by, as they lie and transposed.

A value is stored as ``x / scale``, where ``scale`` is the least power of two that keeps the largest magnitude of its group within the format.
Powers of two change no digit, so a group's scale decides only how far down its smallest values reach. A group is a whole tensor
(``tensorwise``), a row (``rowwise``) or 128 neighbours in a row (``blockwise``); a transposed copy has groups of its own.

CUDA tensors go through Triton kernels: one that takes the maxima, which blockwise scales do not need, and one that writes both copies.
Elsewhere PyTorch computes the same, to the bit.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mamba_pretrain.ops.kernel_arguments import on_device_of
from mamba_pretrain.ops.operator import operator
from mamba_pretrain.ops.triton_launch import launch

Scaling = Literal["tensorwise", "rowwise", "blockwise"]
BLOCK = 128
# The largest value of each format is 1.75 * 2**SHIFT.
SHIFT = {torch.float8_e4m3fn: 8, torch.float8_e5m2: 15}
SCALINGS = ("tensorwise", "rowwise", "blockwise")  # as the kernels number them
# Rows and columns of a program, its warps and the registers of a thread (None: as the compiler likes). Chosen so that at least two programs
# fit on a multiprocessor of sm_90; none has been timed. Blockwise scales need tiles of whole blocks.
Tile = tuple[int, int, int, "int | None"]
TILES: dict[str, Tile] = {"largest": (128, 128, 8, None), "cast": (128, 64, 8, None), "cast blockwise": (BLOCK, BLOCK, 8, 128)}


class Scaled(NamedTuple):
    """``values`` (rows, k) in 8 bits and ``scale``, fp32: (1, 1), (rows, 1), or (rows, blocks of k) with adjacent rows."""

    values: Tensor
    scale: Tensor

    def restored(self) -> Tensor:
        """What it stands for, fp32."""
        scale = self.scale
        if scale.shape[1] > 1:
            scale = scale.repeat_interleave(BLOCK, 1)[:, : self.values.shape[1]]
        return self.values.float() * scale


def cast_rows(parts: Sequence[Tensor], scaling: Scaling, dtype: torch.dtype) -> Scaled:
    """The matrix whose columns are those of ``parts`` (rows, width) in turn."""
    return Scaled(*cast(list(parts), scaling, dtype, True, False)[:2])


def cast_columns(parts: Sequence[Tensor], scaling: Scaling, dtype: torch.dtype) -> Scaled:
    """Its transpose."""
    return Scaled(*cast(list(parts), scaling, dtype, False, True)[2:])


def cast_both(parts: Sequence[Tensor], scaling: Scaling, dtype: torch.dtype) -> tuple[Scaled, Scaled]:
    """Both, read once."""
    found = cast(list(parts), scaling, dtype, True, True)
    return Scaled(*found[:2]), Scaled(*found[2:])


def triton_missing() -> bool:
    """Whether CUDA tensors cannot be cast."""
    return importlib.util.find_spec("triton") is None


@operator("fp8_cast")
def cast(parts: list[Tensor], scaling: str, dtype: torch.dtype, along: bool, across: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Values and scales of the matrix and of its transpose; what is not asked for is empty."""
    return _launched(parts, scaling, dtype, along, across) if parts[0].is_cuda else reference(parts, scaling, dtype, along, across)


@cast.register_fake
def _(parts, scaling, dtype, along, across):  # type: ignore[no-untyped-def]
    return _outputs(parts, scaling, dtype, along, across)


def _outputs(parts: list[Tensor], scaling: str, dtype: torch.dtype, along: bool, across: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, total = parts[0].shape[0], sum(part.shape[1] for part in parts)
    values, scale = _output(parts[0], rows, total, scaling, dtype, along)
    return values, scale, *_output(parts[0], total, rows, scaling, dtype, across)


def _output(like: Tensor, rows: int, k: int, scaling: str, dtype: torch.dtype, wanted: bool) -> tuple[Tensor, Tensor]:
    if not wanted:
        rows = k = 0
    groups = {"tensorwise": (1, 1), "rowwise": (1, rows), "blockwise": (-(-k // BLOCK), rows)}[scaling]
    scale = like.new_empty(groups if wanted else (0, 0), dtype=torch.float32)
    return like.new_empty((rows, k), dtype=dtype), scale.t()


def reference(parts: list[Tensor], scaling: str, dtype: torch.dtype, along: bool, across: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``cast`` in PyTorch."""
    x = torch.cat(parts, 1).to(torch.bfloat16).float()
    found = _outputs(parts, scaling, dtype, along, across)
    for wanted, source, values, scale in ((along, x, *found[:2]), (across, x.t(), *found[2:])):
        if wanted:
            _reference_rows(source, scaling, values, scale)
    return found


def _reference_rows(x: Tensor, scaling: str, values: Tensor, scale: Tensor) -> None:
    bits = x.abs().contiguous().view(torch.int32)
    if scaling == "tensorwise":
        groups = bits.reshape(1, 1, -1)
    elif scaling == "rowwise":
        groups = bits.unsqueeze(1)
    else:
        padded = torch.nn.functional.pad(bits, (0, scale.shape[1] * BLOCK - bits.shape[1]))
        groups = padded.unflatten(1, (-1, BLOCK))
    largest = groups.amax(2) if groups.numel() else groups.new_zeros(scale.shape)
    exponent = (((largest + 0x1FFFFF) >> 23) - SHIFT[values.dtype]).clamp(min=1)
    exponent = torch.where(largest < 0x7F800000, exponent, 255)  # what is not finite: seen behind the matmul
    scale.copy_((exponent << 23).view(torch.float32))
    inverse = ((254 - exponent).clamp(min=0) << 23).view(torch.float32)
    if scaling == "blockwise":
        inverse = inverse.repeat_interleave(BLOCK, 1)[:, : x.shape[1]]
    values.copy_(x * inverse)


def _launched(parts: list[Tensor], scaling: str, dtype: torch.dtype, along: bool, across: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``cast`` in Triton, part by part."""
    from mamba_pretrain.ops import triton_fp8_kernels as kernels

    found = _outputs(parts, scaling, dtype, along, across)
    number = SCALINGS.index(scaling)
    rows, total = parts[0].shape[0], sum(part.shape[1] for part in parts)
    parts, offsets = _placed([part if part.stride(1) == 1 else part.contiguous() for part in parts], scaling)
    of_rows = of_columns = found[1]  # not read by blockwise scaling
    with on_device_of(parts[0]):
        if scaling != "blockwise":
            bits = parts[0].new_zeros(1 if scaling == "tensorwise" else rows + total, dtype=torch.int32)
            of_rows, of_columns = bits, bits[rows:]
            for part, offset in zip(parts, offsets, strict=True):
                grid, tiled, options = _tiled(part, TILES["largest"])
                sizes = part.stride(0), rows, part.shape[1], offset
                launch(kernels.largest, grid, part, of_rows, of_columns, *sizes, number, along, across, *tiled, **options)
        tile = TILES["cast blockwise" if scaling == "blockwise" else "cast"]
        for part, offset in zip(parts, offsets, strict=True):
            grid, tiled, options = _tiled(part, tile)
            numbers = part.stride(0), rows, part.shape[1], total, offset, number, SHIFT[dtype], along, across, *tiled
            launch(kernels.cast, grid, part, *found, of_rows, of_columns, *numbers, **options)
    return found


def _tiled(part: Tensor, tile: Tile) -> tuple[tuple[int, int, int], tuple[int, int], dict[str, int]]:
    """The programs of a part, their rows and columns, and how they run."""
    rows, columns, warps, registers = tile
    options = {"num_warps": warps} if registers is None else {"num_warps": warps, "maxnreg": registers}
    return (-(-part.shape[0] // rows) * -(-part.shape[1] // columns), 1, 1), (rows, columns), options


def _placed(parts: list[Tensor], scaling: str) -> tuple[list[Tensor], list[int]]:
    """Parts and the columns at which they begin; one part where blocks would reach from one into the next."""
    offsets = [sum(part.shape[1] for part in parts[:i]) for i in range(len(parts))]
    if scaling == "blockwise" and any(offset % BLOCK for offset in offsets):
        return [torch.cat(parts, 1)], [0]
    return parts, offsets
