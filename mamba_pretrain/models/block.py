"""A block: norm, mixer, and optionally norm and MLP, around the residual stream."""

from __future__ import annotations

from torch import Tensor, nn

from mamba_pretrain.models.attention import Attention
from mamba_pretrain.models.boundaries import Boundaries
from mamba_pretrain.models.config import ModelConfig
from mamba_pretrain.models.mamba1 import Mamba1
from mamba_pretrain.models.mamba2 import Mamba2
from mamba_pretrain.models.mixer import Mixer, State
from mamba_pretrain.models.mlp import GatedMLP
from mamba_pretrain.models.modules import RMSNorm

MIXER_CLASSES: dict[str, type[Mixer]] = {"mamba1": Mamba1, "mamba2": Mamba2, "attention": Attention}


class Block(nn.Module):
    """Pre-norm block that passes (hidden, residual) on, so that each addition is fused with the norm behind it."""

    def __init__(self, config: ModelConfig, mixer: str) -> None:
        super().__init__()
        self.residual_in_fp32 = config.residual_in_fp32
        self.norm = RMSNorm(config.d_model, config.layer_norm_epsilon)
        self.mixer = MIXER_CLASSES[mixer](config)
        self.mlp_norm = RMSNorm(config.d_model, config.layer_norm_epsilon) if config.d_intermediate else None
        self.mlp = GatedMLP(config) if config.d_intermediate else None

    def forward(
        self, hidden: Tensor, residual: Tensor | None, boundaries: Boundaries | None = None, state: State | None = None
    ) -> tuple[Tensor, Tensor]:
        """``hidden`` (b, l, d) is yet to be added to ``residual`` (b, l, d; None before the first block); the same pair comes out."""
        x, residual = self._add_and_norm(self.norm, hidden, residual)
        hidden = self.mixer(x, boundaries, state)
        if self.mlp is not None and self.mlp_norm is not None:
            x, residual = self._add_and_norm(self.mlp_norm, hidden, residual)
            hidden = self.mlp(x)
        return hidden, residual

    def _add_and_norm(self, norm: RMSNorm, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        x, residual = norm(hidden, residual)
        return x, residual if self.residual_in_fp32 else residual.to(x.dtype)

    def flops_per_token(self, length: int) -> float:
        """FLOPs of the forward pass per token."""
        return self.mixer.flops_per_token(length) + (self.mlp.flops_per_token(length) if self.mlp is not None else 0.0)
