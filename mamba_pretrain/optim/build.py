"""Builds the optimizer over the engine's (possibly sharded) parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from data_tools.errors import UserError
from mamba_pretrain.optim.config import OptimConfig
from mamba_pretrain.optim.groups import NamedParameters, Policy, split_by_decay

# A group's learning rate is `lr_scale` times the schedule's rate: Muon's group runs at a rate of its own under the same curve.
Build = Callable[[Iterable[tuple[str, nn.Parameter]]], torch.optim.Optimizer]


def optimizer_builder(config: OptimConfig, policies: Mapping[str, Policy]) -> Build:
    """A function from named parameters to an optimizer; engines call it once their parameters exist."""
    builders = {"adamw": _adamw, "adamw8bit": _adamw8bit, "muon": _muon}

    def build(named: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        return builders[config.name](config, *split_by_decay(named, policies))

    return build


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets every group's rate to ``lr`` times the group's own scale."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def _groups(config: OptimConfig, decayed: NamedParameters, rest: NamedParameters) -> list[dict[str, Any]]:
    pairs = ((decayed, config.weight_decay), (rest, 0.0))
    return [{"params": [p for _, p in named], "weight_decay": decay, "lr_scale": 1.0} for named, decay in pairs if named]


def _adamw(config: OptimConfig, decayed: NamedParameters, rest: NamedParameters) -> torch.optim.Optimizer:
    # `fused` updates all parameters in a few kernels and is implemented for CPU and CUDA alike, so engines share one arithmetic.
    return torch.optim.AdamW(_groups(config, decayed, rest), lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def _adamw8bit(config: OptimConfig, decayed: NamedParameters, rest: NamedParameters) -> torch.optim.Optimizer:
    try:
        from torchao.optim import AdamW8bit
    except ImportError as error:
        raise UserError("optim.name: adamw8bit needs the package torchao; install it (pip install torchao) or use adamw") from error
    return AdamW8bit(_groups(config, decayed, rest), lr=config.lr, betas=config.betas, eps=config.eps)


def _muon(config: OptimConfig, decayed: NamedParameters, rest: NamedParameters) -> torch.optim.Optimizer:
    from mamba_pretrain.optim.muon import MuonWithAdamW

    return MuonWithAdamW(config, decayed, rest)
