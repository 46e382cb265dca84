"""Small modules shared by blocks and mixers; each calls one op and owns its parameters, so that sharding hooks fire."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mamba_pretrain.models import distributions
from mamba_pretrain.models.mixer import ParameterPolicy, State
from mamba_pretrain.ops.causal_conv1d import causal_conv1d
from mamba_pretrain.ops.conv_step import conv_step
from mamba_pretrain.ops.cross_entropy import linear_cross_entropy
from mamba_pretrain.ops.fp8 import Recipe
from mamba_pretrain.ops.projection import project, project_beside, project_parts
from mamba_pretrain.ops.rms_norm import gated_rms_norm, rms_norm

Policies = dict[str, ParameterPolicy]


class Projection(nn.Linear):
    """A linear layer whose backward pass makes no extra pass over memory; see ``ops/projection.py``."""

    recipe: Recipe | None = None  # of FP8, see ``models/fp8.py``

    def forward(self, x: Tensor, within: Callable[[Tensor, Tensor], Tensor] | None = None) -> Tensor:
        """``x`` (b, l, in) to (b, l, out); or what ``within(x, weight)`` gives, an operation that has the projection inside."""
        return project(x, self.weight, self.bias, self.recipe) if within is None else within(x, self.weight)


class SplitProjection(nn.Linear):
    """A projection whose output is used in parts of the given widths."""

    recipe: Recipe | None = None

    def __init__(self, in_features: int, widths: Sequence[int], bias: bool) -> None:
        super().__init__(in_features, sum(widths), bias=bias)
        self.widths = tuple(widths)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        """``x`` (b, l, in) to parts (b, l, width)."""
        return project_parts(x, self.weight, self.bias, self.widths, self.recipe)


class SideProjection(nn.Linear):
    """A projection of something that one other operation uses as well, and whose gradient that operation makes anew."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """``x`` (b, l, in) to x for the other operation, and the projection (b, l, out)."""
        return project_beside(x, self.weight, self.bias)


# Every class of projections: engines that treat their weights by class go by it.
PROJECTIONS: tuple[type[nn.Linear], ...] = (Projection, SplitProjection, SideProjection)


class RMSNorm(nn.Module):
    """Adds to the residual stream and normalises the sum: (x, residual) -> (normalised, new residual)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.eps = eps

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``x``, ``residual`` (b, l, dim); the first layer has no residual yet. The new residual is fp32."""
        if residual is None:
            return cast(Tensor, rms_norm(x, self.weight, self.eps)), x.float()
        return cast("tuple[Tensor, Tensor]", rms_norm(x, self.weight, self.eps, residual=residual))

    def parameter_policy(self) -> Policies:
        """Norm weights never decay and are used in fp32."""
        return {"weight": ParameterPolicy(decay=False, fp32=True, init=distributions.constant(1.0))}


class GatedRMSNorm(nn.Module):
    """Mamba-2's norm(x * silu(z)) over groups of ``group_size`` channels."""

    def __init__(self, dim: int, eps: float, group_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.eps = eps
        self.group_size = group_size

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """``x``, ``z`` (b, l, dim)."""
        return gated_rms_norm(x, z, self.weight, self.eps, group_size=self.group_size)


class CausalConv1d(nn.Module):
    """Depthwise causal convolution followed by SiLU; ``weight`` (channels, taps)."""

    def __init__(self, channels: int, taps: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, taps))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None

    def forward(self, x: Tensor, seq_idx: Tensor | None = None, state: State | None = None) -> Tensor:
        """``x`` (b, l, channels); ``state["conv"]`` (b, taps - 1, channels) holds the inputs before it and is updated in place."""
        if state is None:
            return cast(Tensor, causal_conv1d(x, self.weight, self.bias, activation="silu", seq_idx=seq_idx))
        if x.shape[1] == 1:
            return conv_step(x[:, 0], self.weight, self.bias, state["conv"]).unsqueeze(1)
        initial = state["conv"].to(x.dtype) if state["started"] else None
        y, final = causal_conv1d(x, self.weight, self.bias, activation="silu", initial_state=initial, return_final_state=True)
        state["conv"].copy_(final)
        return y

    def parameter_policy(self) -> Policies:
        """PyTorch's default initialisation; a convolution's taps are no projection and do not decay."""
        names = ("weight",) if self.bias is None else ("weight", "bias")
        return {name: ParameterPolicy(decay=False, fp32=False, init=distributions.linear(self.weight.shape[1])) for name in names}


class TokenTable(nn.Module):
    """A (rows, d_model) matrix over the vocabulary: token ids to vectors, and vectors to logits or to the loss.

    A tied model uses one table for both; both go through ``forward``, so that a sharding engine has gathered the weight. Rows past
    ``vocab_size`` exist for the matmul's alignment only: they get no probability and no gradient.
    """

    def __init__(self, rows: int, d_model: int, vocab_size: int, std: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, d_model))
        self.vocab_size = vocab_size
        self.std = std

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """Token ids (b, l) give vectors (b, l, d); vectors give logits (b, l, vocab_size) or, with ``labels``, the sum of token losses."""
        if not x.is_floating_point():
            return F.embedding(x, self.weight)
        if labels is None:
            return F.linear(x, self.weight)[..., : self.vocab_size]
        return linear_cross_entropy(x, self.weight, labels, valid_vocab=self.vocab_size)

    def parameter_policy(self) -> Policies:
        """Embeddings decay like projections."""
        return {"weight": ParameterPolicy(decay=True, fp32=False, init=distributions.normal(self.std))}


def projection_policy(name: str, module: nn.Linear, scale: float = 1.0) -> Policies:
    """Policies of a projection called ``name``: PyTorch's default initialisation times ``scale``; only the weight decays."""
    policies = {f"{name}.weight": ParameterPolicy(decay=True, fp32=False, init=distributions.linear(module.in_features, scale))}
    if module.bias is not None:
        policies[f"{name}.bias"] = ParameterPolicy(decay=False, fp32=False, init=distributions.constant(0.0))
    return policies


def prefixed(prefix: str, policies: Policies) -> Policies:
    """The same policies under ``prefix.``."""
    return {f"{prefix}.{name}": policy for name, policy in policies.items()}
