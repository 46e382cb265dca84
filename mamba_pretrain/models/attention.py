"""Causal attention with rotary positions (arXiv:2104.09864) and grouped key heads (arXiv:2305.13245), for hybrids."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from mamba_pretrain.models.boundaries import Boundaries
from mamba_pretrain.models.config import ModelConfig
from mamba_pretrain.models.mixer import Mixer, State
from mamba_pretrain.models.modules import Policies, Projection, SplitProjection, projection_policy
from mamba_pretrain.ops.flops import attention_flops, linear_flops


class Attention(Mixer):
    """Softmax attention inside each document."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.n_head, self.n_kv_head, self.headdim = config.n_head, config.n_kv_head, config.attention_headdim
        widths = [heads * self.headdim for heads in (self.n_head, self.n_kv_head, self.n_kv_head)]
        self.qkv_proj = SplitProjection(config.d_model, widths, bias=config.use_bias)
        self.out_proj = Projection(self.n_head * self.headdim, config.d_model, bias=config.use_bias)

    def forward(self, x: Tensor, boundaries: Boundaries | None = None, state: State | None = None) -> Tensor:
        """See ``Mixer.forward``."""
        q, k, v = (t.unflatten(-1, (-1, self.headdim)).transpose(1, 2) for t in self.qkv_proj(x))  # (b, heads, l, headdim)
        positions = self._positions(x, boundaries, state)
        q, k = (rotate(t, positions, self.config.rotated_channels, self.config.rope_theta) for t in (q, k))
        if state is not None:
            y = self._attend_to_cache(q, k, v, positions, state)
        elif boundaries is None:
            y = F.scaled_dot_product_attention(q, self._repeat(k), self._repeat(v), is_causal=True)
        else:
            y = F.scaled_dot_product_attention(q, self._repeat(k), self._repeat(v), attn_mask=boundaries.attention_mask)
        return self.out_proj(y.transpose(1, 2).flatten(-2))

    def _positions(self, x: Tensor, boundaries: Boundaries | None, state: State | None) -> Tensor:
        if boundaries is not None:
            return boundaries.positions
        positions = torch.arange(x.shape[1], device=x.device)
        return positions if state is None else positions + state["length"]

    def _attend_to_cache(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, state: State) -> Tensor:
        # The whole buffer is attended to under a mask: its shape never changes and nothing is read by the host.
        state["k"].index_copy_(2, positions, k.to(state["k"].dtype))
        state["v"].index_copy_(2, positions, v.to(state["v"].dtype))
        state["length"].add_(q.shape[2])
        visible = torch.arange(state["k"].shape[2], device=q.device)[None, :] <= positions[:, None]
        keys, values = (self._repeat(state[name].to(q.dtype)) for name in ("k", "v"))
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=visible)

    def _repeat(self, t: Tensor) -> Tensor:
        return t if self.n_head == self.n_kv_head else t.repeat_interleave(self.n_head // self.n_kv_head, dim=1)

    def parameter_policy(self) -> Policies:
        """See ``Mixer.parameter_policy``."""
        scale = 1.0 / math.sqrt(self.config.n_residual) if self.config.rescale_prenorm_residual else 1.0
        return {**projection_policy("qkv_proj", self.qkv_proj), **projection_policy("out_proj", self.out_proj, scale)}

    def flops_per_token(self, length: int) -> float:
        """See ``Mixer.flops_per_token``."""
        projections = sum(linear_flops(1, p.in_features, p.out_features) for p in (self.qkv_proj, self.out_proj))
        return projections + attention_flops(length, self.n_head, self.headdim)

    def new_state(
        self, batch: int, max_length: int, device: torch.device | str, dtype: torch.dtype, recurrent: torch.dtype = torch.float32
    ) -> State:
        """See ``Mixer.new_state``: keys and values of ``max_length`` tokens, and how many of them are filled."""
        shape = (batch, self.n_kv_head, max_length, self.headdim)
        k, v = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        return {"k": k, "v": v, "length": torch.zeros((), dtype=torch.int64, device=device)}


def rotate(t: Tensor, positions: Tensor, channels: int, theta: float) -> Tensor:
    """Rotary embedding of the first ``channels`` channels of ``t`` (b, heads, l, headdim), in halves; ``positions`` (l,) or (b, l).

    Angles are fp32 whatever the compute precision.
    """
    if channels == 0:
        return t
    frequencies = theta ** (-torch.arange(0, channels, 2, device=t.device, dtype=torch.float32) / channels)
    angles = (positions[..., None].float() * frequencies).unsqueeze(-3)  # (1 | b, 1, l, channels / 2)
    cos, sin = angles.cos(), angles.sin()
    first, second = t[..., :channels].float().chunk(2, dim=-1)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(t.dtype)
    return turned if channels == t.shape[-1] else torch.cat([turned, t[..., channels:]], dim=-1)
