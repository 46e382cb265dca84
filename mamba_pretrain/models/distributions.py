"""What parameters are drawn from: each function returns a ``mixer.Initializer``, which draws a full fp32 tensor from a generator."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor

from mamba_pretrain.models.mixer import Initializer


def constant(value: float) -> Initializer:
    """Every element is ``value``."""
    return lambda generator, shape: torch.full(shape, value)


def normal(std: float) -> Initializer:
    """Normal with mean 0."""
    return lambda generator, shape: torch.empty(shape).normal_(0.0, std, generator=generator)


def uniform(bound: float) -> Initializer:
    """Uniform in [-bound, bound]."""
    return lambda generator, shape: torch.empty(shape).uniform_(-bound, bound, generator=generator)


def linear(fan_in: int, scale: float = 1.0) -> Initializer:
    """PyTorch's default for linear layers and convolutions, uniform in +-1/sqrt(fan_in), times ``scale``."""
    return uniform(scale / math.sqrt(fan_in))


def log_arange() -> Initializer:
    """Mamba-1's A_log (d, n): log(1 .. n) in every row, the S4D-real initialisation."""
    return lambda generator, shape: torch.log(torch.arange(1, shape[1] + 1, dtype=torch.float32)).expand(shape).clone()


def log_uniform_range(low: float, high: float) -> Initializer:
    """Mamba-2's A_log: the logarithm of a value uniform in [low, high]."""
    return lambda generator, shape: torch.empty(shape).uniform_(low, high, generator=generator).log()


def inverse_softplus_time_step(low: float, high: float, floor: float) -> Initializer:
    """dt_bias: softplus(dt_bias) is log-uniform in [low, high] and at least ``floor``."""

    def draw(generator: Generator, shape: tuple[int, ...]) -> Tensor:
        uniform_log = torch.empty(shape).uniform_(math.log(low), math.log(high), generator=generator)
        dt = uniform_log.exp().clamp(min=floor)
        # softplus(x) = dt  <=>  x = dt + log(1 - exp(-dt)), in a form that is exact for small dt.
        return dt + torch.log(-torch.expm1(-dt))

    return draw
