"""Initialisation: one idempotent function, the same bits whatever the device, the sharding or the order of parameters."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from mamba_pretrain.models.language_model import LanguageModel

Assign = Callable[[str, nn.Parameter, Tensor], None]


def copy(name: str, parameter: nn.Parameter, full: Tensor) -> None:
    """Fills a plain parameter; engines that shard pass an ``assign`` of their own."""
    with torch.no_grad():
        parameter.copy_(full)


def initialize(model: LanguageModel, seed: int, assign: Assign = copy) -> None:
    """Draws every parameter of ``model`` anew.

    Each parameter's full fp32 value is drawn on the CPU from a generator seeded by (seed, name) and handed to
    ``assign(name, parameter, full)``. Nothing depends on other parameters, so sharded, meta-device and eager models get the same bits,
    and a second call changes nothing.
    """
    policies = model.parameter_policies()
    for name, parameter in model.named_parameters():
        generator = torch.Generator("cpu").manual_seed(parameter_seed(seed, name))
        assign(name, parameter, policies[name].init(generator, model.parameter_shapes[name]))


def parameter_seed(seed: int, name: str) -> int:
    """A 63-bit seed for one parameter."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest(), "little") >> 1
