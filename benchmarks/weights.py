"""Initial weights drawn on the GPU: drawing a billion of them on the CPU, as a run does, takes a minute."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

SEED = 1


def draw(model: Any, seed: int, assign: Callable[[str, Any, Any], None], device: str = "cuda") -> None:
    """``models.init.initialize`` on a device: the same distributions and other numbers, equal at every call."""
    import torch

    from mamba_pretrain.models.init import parameter_seed

    policies = model.parameter_policies()
    for name, parameter in model.named_parameters():
        generator = torch.Generator(device).manual_seed(parameter_seed(seed, name))
        with torch.device(device):
            full = policies[name].init(generator, model.parameter_shapes[name])
        assign(name, parameter, full)


def drawn(config: Any, device: str = "cuda") -> dict[str, Any]:
    """All weights of a model by our names."""
    import torch

    from mamba_pretrain.models.language_model import LanguageModel

    with torch.device("meta"):
        model = LanguageModel(config)
    weights: dict[str, Any] = {}
    draw(model, SEED, lambda name, _, full: weights.update({name: full}), device)
    return weights


@contextlib.contextmanager
def quick_initialization(device: str = "cuda") -> Iterator[None]:
    """Inside, an engine's ``prepare`` gives a model the weights of ``drawn``, whatever its seed."""
    from mamba_pretrain.models.init import copy
    from mamba_pretrain.parallel import torch_engine

    def initialize(model: Any, seed: int, assign: Any = copy) -> None:
        draw(model, SEED, assign, device)

    original, torch_engine.initialize = torch_engine.initialize, initialize
    try:
        yield
    finally:
        torch_engine.initialize = original
