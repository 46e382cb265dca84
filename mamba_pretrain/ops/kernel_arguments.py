"""How tensors reach kernels that take one struct: CUDA kernels by a launch, C kernels by a call."""

from __future__ import annotations

import ctypes
from typing import Any

from torch import Tensor


class Rows(ctypes.Structure):
    """A (batch, length, channels) tensor with adjacent channels."""

    _fields_ = (("data", ctypes.c_void_p), ("batch_stride", ctypes.c_longlong), ("row_bytes", ctypes.c_int))


def struct(name: str, **fields: type) -> Any:
    """A ctypes struct with these fields, in order."""
    return type(name, (ctypes.Structure,), {"_fields_": tuple(fields.items())})


def fields(names: str, kind: type) -> dict[str, type]:
    """Fields of one type."""
    return dict.fromkeys(names.split(), kind)


def rows(tensor: Tensor | None) -> Rows:
    """A tensor as the kernels address it; nothing if it is absent."""
    if tensor is None:
        return Rows()
    return Rows(tensor.data_ptr(), tensor.stride(0), tensor.stride(1) * tensor.element_size())


def pointer(tensor: Tensor | None) -> int | None:
    """Where a tensor begins; null if it is absent."""
    return None if tensor is None else tensor.data_ptr()


def adjacent(tensor: Any) -> Any:
    """A tensor (or None) with adjacent channels; a copy only if they are not."""
    return tensor if tensor is None or tensor.stride(-1) == 1 else tensor.contiguous()
