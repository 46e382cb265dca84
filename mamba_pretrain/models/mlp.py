"""Gated MLP (SwiGLU, arXiv:2002.05202)."""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn import functional as F

from mamba_pretrain.models.config import ModelConfig
from mamba_pretrain.models.modules import Policies, Projection, SplitProjection, projection_policy
from mamba_pretrain.ops.flops import linear_flops


class GatedMLP(nn.Module):
    """down(silu(gate) * up), with gate and up as one projection."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.gate_up_proj = SplitProjection(config.d_model, (config.d_intermediate,) * 2, bias=False)
        self.down_proj = Projection(config.d_intermediate, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(b, l, d_model) to the same shape."""
        gate, up = self.gate_up_proj(x)
        return self.down_proj(F.silu(gate) * up)

    def parameter_policy(self) -> Policies:
        """Both projections decay; the one into the residual stream starts smaller."""
        scale = 1.0 / math.sqrt(self.config.n_residual) if self.config.rescale_prenorm_residual else 1.0
        return {**projection_policy("gate_up_proj", self.gate_up_proj), **projection_policy("down_proj", self.down_proj, scale)}

    def flops_per_token(self, length: int) -> float:
        """FLOPs of the forward pass per token."""
        return sum(linear_flops(1, p.in_features, p.out_features) for p in (self.gate_up_proj, self.down_proj))
