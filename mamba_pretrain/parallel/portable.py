"""The portable form of sharded state: flat pieces of named tensors.

Every tensor is a row-major sequence of fp32 numbers; a piece is a contiguous range of it. FSDP2's dim-0 shards (uneven ones too), ZeRO's flat
partitions and whole tensors are all such ranges, so one layout serves every engine and world size, with range arithmetic only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from data_tools.errors import UserError


@dataclass(frozen=True)
class Segment:
    """``data`` (1-D) is the range that begins at element ``offset`` of the row-major tensor ``name`` of ``shape``."""

    name: str
    shape: tuple[int, ...]
    offset: int
    data: Tensor


class Reader(Protocol):
    """Serves any range of any tensor of a checkpoint, whatever engine and world size wrote it."""

    @property
    def source(self) -> str:
        """Where the tensors come from, for messages."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's name and shape."""

    def read(self, name: str, offset: int, length: int) -> Tensor:
        """Elements [offset, offset + length) of a tensor, 1-D, on the CPU."""


def whole(reader: Reader, name: str) -> Tensor:
    """A whole tensor in its shape."""
    shape = reader.shapes()[name]
    return reader.read(name, 0, torch.Size(shape).numel()).view(shape)


def split_range(numel: int, rank: int, world_size: int) -> tuple[int, int]:
    """The (offset, length) of a rank's share when ``numel`` elements are cut into contiguous, nearly equal ranges."""
    first, end = numel * rank // world_size, numel * (rank + 1) // world_size
    return first, end - first


def check_shapes(reader: Reader, expected: dict[str, tuple[int, ...]]) -> None:
    """Raises UserError unless the checkpoint's model tensors are exactly those expected; names the first that is not."""
    found = {name.removeprefix("model."): shape for name, shape in reader.shapes().items() if name.startswith("model.")}
    for name in [*expected, *found]:
        ours, theirs = expected.get(name), found.get(name)
        if ours != theirs:
            raise UserError(
                f"the checkpoint in {reader.source} is of another architecture: {name} is {theirs or 'absent'} there and {ours or 'absent'} "
                "in this config's model; use the run's own model section, or another run_dir"
            )


def check_moments(reader: Reader, expected: Mapping[str, Iterable[str]]) -> bool:
    """Whether the checkpoint holds optimizer state: imported weights, and what was saved before the first step, have none.

    ``expected``: names of the optimizer's tensors by parameter. Raises UserError when the checkpoint's are others: another optimizer's.
    """
    found: dict[str, set[str]] = {}
    for name in reader.shapes():
        if name.startswith("optim."):
            parameter, _, moment = name.removeprefix("optim.").rpartition(".")
            found.setdefault(parameter, set()).add(moment)
    for parameter, moments in expected.items() if found else ():
        theirs = found.get(parameter, set())
        if theirs != set(moments):
            raise UserError(
                f"the checkpoint in {reader.source} is of another optimizer: for {parameter} it holds {', '.join(sorted(theirs)) or 'nothing'} "
                f"instead of {', '.join(sorted(moments))}; use the run's own optim.name, or start a new run with train.init_from"
            )
    return bool(found)


def pieces(name: str, tensor: Tensor, rank: int, world_size: int) -> Iterator[Segment]:
    """This rank's share of a tensor that every rank holds whole."""
    offset, length = split_range(tensor.numel(), rank, world_size)
    if length:
        yield Segment(name, tuple(tensor.shape), offset, tensor.detach().reshape(-1)[offset : offset + length])
