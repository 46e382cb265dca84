"""How tensors reach kernels that take one struct: CUDA kernels by a launch, C kernels by a call."""

from __future__ import annotations

import ctypes
import struct as memory
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import Any

import torch
from torch import Tensor


class Rows(ctypes.Structure):
    """A (batch, length, channels) tensor with adjacent channels."""

    _fields_ = (("data", ctypes.c_void_p), ("batch_stride", ctypes.c_longlong), ("row_bytes", ctypes.c_int))


class Struct:
    """A C struct. Called with the values of its fields, in order or by name, it gives the struct's bytes; the first may be ``Rows``.

    Packed at once by the module struct: to fill an instance of a ctypes type takes twice as long, and a layer does so for every kernel.
    """

    def __init__(self, name: str, fields: dict[str, Any]) -> None:
        self.name = name
        self._strided = sum(kind is Rows for kind in fields.values())
        self._absent = dict.fromkeys(fields, 0) | dict.fromkeys([*fields][: self._strided], rows(None))
        codes = "".join("Pqi4x" if kind is Rows else kind._type_ for kind in fields.values())
        self._pack = memory.Struct(codes).pack

    def __call__(self, *values: Any, **named: Any) -> bytes:
        if named:
            values = tuple({**self._absent, **dict(zip(self._absent, values, strict=False)), **named}.values())
        return self._pack(*chain.from_iterable(values[: self._strided]), *values[self._strided :])


def struct(name: str, **fields: Any) -> Struct:
    """A struct with these fields, in order, of ctypes' types and ``Rows``."""
    return Struct(name, fields)


def fields(names: str, kind: Any) -> dict[str, Any]:
    """Fields of one type."""
    return dict.fromkeys(names.split(), kind)


def rows(tensor: Tensor | None) -> tuple[int, int, int]:
    """A tensor as ``Rows``; zeros if it is absent."""
    if tensor is None:
        return 0, 0, 0
    return tensor.data_ptr(), tensor.stride(0), tensor.stride(1) * tensor.element_size()


def pointer(tensor: Tensor | None) -> int:
    """Where a tensor begins; null if it is absent."""
    return 0 if tensor is None else tensor.data_ptr()


def adjacent(tensor: Any) -> Any:
    """A tensor (or None) with adjacent channels; a copy only if they are not."""
    return tensor if tensor is None or tensor.stride(-1) == 1 else tensor.contiguous()


_nothing = nullcontext()


def on_device_of(tensor: Tensor) -> AbstractContextManager:
    """Inside, a tensor's GPU is the current one, as launches on its streams need; costs nothing where it is so already."""
    index = tensor.get_device()
    return _nothing if index < 0 or index == torch.cuda.current_device() else torch.cuda.device(index)
