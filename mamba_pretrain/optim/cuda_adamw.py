"""AdamW's step by a kernel of our own: one launch for all tensors of a group, with clipping inside.

torch's fused step that divides gradients writes the quotients back, 4 bytes an element of 32, and comes in launches of 320 blocks, each of which
fills a large GPU once and then waits for its last blocks.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from mamba_pretrain.ops import nvrtc, weight_copy
from mamba_pretrain.ops.kernel_arguments import fields, on_device_of, struct

log = logging.getLogger(__name__)

THREADS, CHUNK = 256, 1 << 14  # as in adamw.cu
MACROS = {"SCALAR_TYPE": 1}  # copies are bf16
AdamwParams = struct(
    "AdamwParams",
    **fields("tensors chunks divisor", ctypes.c_void_p),
    **fields("lr decay beta1 fresh1 log_beta1 beta2 fresh2 log_beta2 eps", ctypes.c_float),
)
# Parameters, gradients, both moments and steps, as torch's optimizer lists them.
Lists = tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor]]


@dataclass(frozen=True)
class Table:
    """Where a group's tensors lie, for the host to compare and on the device."""

    addresses: list[list[int]]  # of parameters, gradients, moments, copies and steps
    sizes: list[int]
    tensors: Tensor
    chunks: Tensor


_tables: WeakKeyDictionary[torch.optim.Optimizer, dict[int, Table]] = WeakKeyDictionary()


def unsupported(lists: Lists) -> str | None:
    """Why the kernel cannot update these tensors, the first of which is on a GPU."""
    device = lists[0][0].device
    for tensors in lists:
        for t in tensors:
            if t.dtype != torch.float32 or t.device != device or not t.is_contiguous():
                return f"it takes contiguous fp32 tensors on one GPU, not {t.dtype} of strides {t.stride()} on {t.device}"
    return nvrtc.unsupported(device)


def table_of(optimizer: torch.optim.Optimizer, number: int, lists: Lists) -> Table | None:
    """The table of the optimizer's group ``number``, which ``step`` takes; None where the kernel cannot serve.

    Written anew, and its tensors looked at, when any lies elsewhere than at the last step: gradients may, where steps are not replayed.
    """
    if not lists[0][0].is_cuda:
        return None
    of_group = _tables.setdefault(optimizer, {})
    *to_here, steps = [[t.data_ptr() for t in tensors] for tensors in lists]
    addresses, sizes = [*to_here, [_copy_of(t) for t in lists[0]], steps], [t.numel() for t in lists[0]]
    known = of_group.get(number)
    if known is not None and (known.addresses, known.sizes) == (addresses, sizes):
        return known
    if (why := unsupported(lists)) is not None:
        _say_once(why)
        return None
    device = lists[0][0].device
    rows = torch.tensor(list(zip(*addresses, sizes, strict=True)), dtype=torch.int64)
    chunks = known.chunks if known is not None and known.sizes == sizes else _on_device(_chunks(sizes), device)
    of_group[number] = Table(addresses, sizes, _on_device(rows, device), chunks)
    return of_group[number]


def step(table: Table, lists: Lists, divisor: Tensor, options: dict[str, Any]) -> None:
    """Updates a group's parameters and moments with gradients divided by ``divisor`` (0-d fp32 on their device).

    ``options``: the group's, of which ``lr``, ``betas``, ``eps`` and ``weight_decay`` are used. The numbers of steps must be raised already.
    Copies in bf16 that parameters keep (``ops/weight_copy.py``) stay valid.
    """
    (beta1, beta2), lr = options["betas"], float(options["lr"])
    of_first, of_second = ((beta, 1.0 - beta, math.log(beta) if beta else -math.inf) for beta in (beta1, beta2))
    pointers = (table.tensors.data_ptr(), table.chunks.data_ptr(), divisor.data_ptr())
    params = AdamwParams(*pointers, lr, lr * options["weight_decay"], *of_first, *of_second, options["eps"])
    if len(table.chunks):
        with on_device_of(divisor):
            _kernel(divisor.get_device())((len(table.chunks), 1, 1), params)
    parameters, _, *moments, _ = lists
    weight_copy.written(parameters)
    torch.autograd.graph.increment_version([t for moment in moments for t in moment])


@functools.cache
def _say_once(why: str) -> None:
    log.warning("optimizer: AdamW by torch's kernels, which take longer: for our own %s", why)


@functools.cache
def _kernel(device: int) -> nvrtc.Kernel:
    log.info("optimizer: AdamW by a kernel of its own")
    return nvrtc.kernel("adamw.cu", MACROS, THREADS, device)


def _copy_of(parameter: Tensor) -> int:
    """Where its copy lies, if it keeps one that is valid."""
    copy = weight_copy.valid(parameter)
    return 0 if copy is None else copy.data_ptr()


def _chunks(sizes: Sequence[int]) -> Tensor:
    """(chunks, 2) int32: the tensor of each, and the how manieth of that tensor it is."""
    each = torch.tensor([-(-size // CHUNK) for size in sizes])
    tensor = torch.arange(len(sizes)).repeat_interleave(each)
    return torch.stack([tensor, torch.arange(len(tensor)) - (each.cumsum(0) - each)[tensor]], 1).to(torch.int32)


def _on_device(table: Tensor, device: torch.device) -> Tensor:
    """A copy that no step waits for."""
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table
