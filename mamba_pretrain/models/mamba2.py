"""Mamba-2: state-space duality (arXiv:2405.21060)."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn

from mamba_pretrain.models import distributions
from mamba_pretrain.models.boundaries import Boundaries
from mamba_pretrain.models.config import ModelConfig
from mamba_pretrain.models.mixer import Mixer, ParameterPolicy, State
from mamba_pretrain.models.modules import CausalConv1d, GatedRMSNorm, Policies, Projection, SplitProjection, prefixed, projection_policy
from mamba_pretrain.ops import flops
from mamba_pretrain.ops.split import split
from mamba_pretrain.ops.ssd_scan import ssd_scan
from mamba_pretrain.ops.ssd_step import ssd_step


class Mamba2(Mixer):
    """x -> (z, xBC, dt); xBC is convolved and split; the scan of x over heads; norm gated by z; projected out."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        d_inner, heads = config.d_inner, config.n_ssm_head
        self.conv_dim = d_inner + 2 * config.ngroups * config.d_state
        self.in_proj = SplitProjection(config.d_model, (d_inner, self.conv_dim, heads), bias=config.use_bias)
        self.conv1d = CausalConv1d(self.conv_dim, config.d_conv, config.use_conv_bias)
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.A_log = nn.Parameter(torch.empty(heads))
        self.D = nn.Parameter(torch.empty(heads))
        self.norm = GatedRMSNorm(d_inner, config.layer_norm_epsilon, d_inner // config.ngroups)
        self.out_proj = Projection(d_inner, config.d_model, bias=config.use_bias)

    def forward(self, x: Tensor, boundaries: Boundaries | None = None, state: State | None = None) -> Tensor:
        """See ``Mixer.forward``."""
        c, seq_idx = self.config, None if boundaries is None else boundaries.seq_idx
        z, xBC, dt = self.in_proj(x)
        xBC = self.conv1d(xBC, seq_idx, state)
        of_group = (c.ngroups, c.d_state)
        u, B, C = split(xBC, (c.n_ssm_head, c.headdim), of_group, of_group)
        return self.out_proj(self.norm(self._scan(u, dt, B, C, seq_idx, state).flatten(-2), z))

    def _scan(self, x: Tensor, dt: Tensor, B: Tensor, C: Tensor, seq_idx: Tensor | None, state: State | None) -> Tensor:
        if state is not None and x.shape[1] == 1:
            return self._step(x, dt, B, C, state)
        A, D, bias = -torch.exp(self.A_log.float()), self.D.float(), self.dt_bias.float()
        chunk, limit = self.config.chunk_size, self.config.dt_limit
        if state is None:
            return cast(Tensor, ssd_scan(x, dt, A, B, C, D=D, dt_bias=bias, seq_idx=seq_idx, chunk_size=chunk, dt_limit=limit))
        initial = state["ssm"].float() if state["started"] else None
        y, final = ssd_scan(
            x, dt, A, B, C, D=D, dt_bias=bias, initial_state=initial, return_final_state=True, chunk_size=chunk, dt_limit=limit
        )
        state["ssm"].copy_(final)
        state["started"] = True
        return y

    def _step(self, x: Tensor, dt: Tensor, B: Tensor, C: Tensor, state: State) -> Tensor:
        """One token."""
        state["started"] = True
        limit = self.config.dt_limit
        y = ssd_step(x[:, 0], dt[:, 0], self.A_log, B[:, 0], C[:, 0], self.D, self.dt_bias, state["ssm"], limit)
        return y.unsqueeze(1)

    def parameter_policy(self) -> Policies:
        """See ``Mixer.parameter_policy``; the initialisation is that of mamba_ssm's Mamba-2."""
        config = self.config
        scale = 1.0 / math.sqrt(config.n_residual) if config.rescale_prenorm_residual else 1.0
        dt_bias = distributions.inverse_softplus_time_step(config.time_step_min, config.time_step_max, config.time_step_floor)
        return {
            "A_log": ParameterPolicy(decay=False, fp32=True, init=distributions.log_uniform_range(*config.A_init_range)),
            "D": ParameterPolicy(decay=False, fp32=True, init=distributions.constant(1.0)),
            "dt_bias": ParameterPolicy(decay=False, fp32=True, init=dt_bias),
            "norm.weight": ParameterPolicy(decay=False, fp32=True, init=distributions.constant(1.0)),
            **projection_policy("in_proj", self.in_proj),
            **projection_policy("out_proj", self.out_proj, scale),
            **prefixed("conv1d", self.conv1d.parameter_policy()),
        }

    def flops_per_token(self, length: int) -> float:
        """See ``Mixer.flops_per_token``."""
        c = self.config
        return (
            sum(flops.linear_flops(1, p.in_features, p.out_features) for p in (self.in_proj, self.out_proj))
            + flops.causal_conv1d_flops(1, self.conv_dim, c.d_conv)
            + flops.ssd_scan_flops(1, length, c.chunk_size, c.n_ssm_head, c.headdim, c.ngroups, c.d_state)
        )

    def new_state(
        self, batch: int, max_length: int, device: torch.device | str, dtype: torch.dtype, recurrent: torch.dtype = torch.float32
    ) -> State:
        """See ``Mixer.new_state``; its size does not depend on ``max_length``."""
        c = self.config
        conv = torch.zeros(batch, c.d_conv - 1, self.conv_dim, device=device, dtype=dtype)
        ssm = torch.zeros(batch, c.n_ssm_head, c.headdim, c.d_state, device=device, dtype=recurrent)
        return {"conv": conv, "ssm": ssm, "started": False}
