"""Launches of Triton kernels without Triton's own way to them, which binds, specialises and looks up arguments at every launch.

What Triton compiles depends on the arguments' dtypes, on which pointers lie on 16 bytes, and on the numbers. The first launch with arguments of a
kind goes through Triton; it gives the compiled kernel, which launches of the same kind then call with bare pointers.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

# By kind, which begins with the identity of the kernel: Triton hashes a kernel by its source. What was compiled, its constants in order, and the
# kernel, which is kept for its identity.
_compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...], Any]] = {}
MAX_COMPILED = 4096  # kinds; far more than a training has


def launch(kernel: Any, grid: tuple[int, int, int], *arguments: Any, **named: Any) -> None:
    """Launches on the current device's current stream. ``arguments``: the kernel's, in order, a tensor first; ``named``: its constants, as far
    as they are not among these, and how it runs (``num_warps``)."""
    kind: list[Any] = [id(kernel), arguments[0].get_device(), tuple(named.items())]
    bare: list[Any] = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            address = argument.data_ptr()
            kind += argument.dtype, address & 15
            bare.append(address)
        else:
            kind.append(argument)
            bare.append(argument)
    key = tuple(kind)
    known = _compiled.get(key)
    if known is not None:
        known[0][grid](*bare, *known[1])
        return
    compiled = kernel[grid](*arguments, **named)
    if compiled is not None:  # as in Triton's interpreter
        if len(_compiled) >= MAX_COMPILED:
            _compiled.clear()
        _compiled[key] = compiled, tuple(named[name] for name in kernel.arg_names[len(arguments) :]), kernel
