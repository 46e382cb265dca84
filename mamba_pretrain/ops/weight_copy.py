"""Copies of fp32 weights in bf16, kept from step to step: a weight is cast once after it has changed, not at every use.

A copy is valid as long as its parameter's version is the one it was made from. Changes in place raise a version; but fused optimizers' do not, so
whoever calls one does. What writes weights by address (``optim/cuda_adamw.py``) writes the copy as well and says so (``written``). A CUDA graph reads
copies by address and asks nothing: ``refresh`` them before a replay.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

_NAME = "_low_precision"  # of the attribute: parameters are hashed by identity, but looked up much slower than attributes


class _Copy:
    __slots__ = ("values", "version")

    def __init__(self, values: Tensor) -> None:
        self.values, self.version = values, -1

    def __reduce__(self) -> tuple[Any, ...]:
        """Of a parameter that is stored and loaded, whose versions begin anew: not valid."""
        return _Copy, (self.values,)


def keep(parameter: nn.Parameter) -> None:
    """Keeps a copy from now on, in memory of its own."""
    values = torch.empty(parameter.shape, dtype=torch.bfloat16, device=parameter.device)
    setattr(parameter, _NAME, _Copy(values))


def cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """``weight`` in ``dtype``: its copy if it keeps one, which is brought up to date if need be."""
    copy = _updated(weight) if dtype == torch.bfloat16 else None
    return weight.to(dtype) if copy is None else copy


def refresh(parameters: Iterable[nn.Parameter]) -> None:
    """Brings the copies of those that keep one up to date."""
    for parameter in parameters:
        _updated(parameter)


@torch.no_grad()
def _updated(weight: Tensor) -> Tensor | None:
    copy: _Copy | None = getattr(weight, _NAME, None)
    if copy is None:
        return None
    if copy.version != weight._version:
        copy.values.copy_(weight)
        copy.version = weight._version
    return copy.values


def valid(parameter: Tensor) -> Tensor | None:
    """The copy of a parameter that keeps one and has not changed since it was made."""
    copy: _Copy | None = getattr(parameter, _NAME, None)
    return None if copy is None or copy.version != parameter._version else copy.values


def written(parameters: Iterable[Tensor]) -> None:
    """Says that parameters were changed by address, and their ``valid`` copies with them.

    A backward pass that is still to come with what it saved of either is refused by autograd from now on.
    """
    for parameter in parameters:
        copy = valid(parameter)
        torch.autograd.graph.increment_version(parameter)
        if copy is not None:
            torch.autograd.graph.increment_version(copy)
            getattr(parameter, _NAME).version = parameter._version
