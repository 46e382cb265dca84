"""The contract of a mixer, the part of a block that moves information along the sequence."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn

from mamba_pretrain.models.boundaries import Boundaries

Initializer = Callable[[Generator, tuple[int, ...]], Tensor]
# What a mixer carries from token to token while generating; buffers are updated in place, so a CUDA graph can replay a step.
State = dict[str, Any]


@dataclass(frozen=True)
class ParameterPolicy:
    """How a parameter is treated.

    ``decay``: weight decay applies. ``fp32``: used in fp32 in every forward pass, whatever the compute precision. ``init``: draws the full
    initial value, fp32 on the CPU, from a generator and a shape.
    """

    decay: bool
    fp32: bool
    init: Initializer


class Mixer(nn.Module, ABC):
    """Maps (b, l, d_model) to (b, l, d_model), causally; consumes document boundaries."""

    @abstractmethod
    def forward(self, x: Tensor, boundaries: Boundaries | None = None, state: State | None = None) -> Tensor:
        """Mixes ``x`` (b, l, d_model). With ``state``, continues from it and updates it in place (then ``boundaries`` is None)."""

    @abstractmethod
    def parameter_policy(self) -> dict[str, ParameterPolicy]:
        """The policy of every parameter, by its name relative to this module."""

    @abstractmethod
    def flops_per_token(self, length: int) -> float:
        """FLOPs of the forward pass per token at sequences of ``length`` tokens; a multiply-add counts as 2."""

    @abstractmethod
    def new_state(
        self, batch: int, max_length: int, device: torch.device | str, dtype: torch.dtype, recurrent: torch.dtype = torch.float32
    ) -> State:
        """An empty state for ``batch`` sequences of at most ``max_length`` tokens.

        ``dtype`` is that of cached activations, ``recurrent`` that of a recurrence's state, which is the sum of all that came before.
        """
