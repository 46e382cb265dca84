"""Mamba-1: selective state spaces (arXiv:2312.00752)."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mamba_pretrain.models import distributions
from mamba_pretrain.models.boundaries import Boundaries
from mamba_pretrain.models.config import ModelConfig
from mamba_pretrain.models.mixer import Mixer, ParameterPolicy, State
from mamba_pretrain.models.modules import CausalConv1d, Policies, Projection, SideProjection, SplitProjection, prefixed, projection_policy
from mamba_pretrain.ops import flops
from mamba_pretrain.ops.selective_scan import selective_scan
from mamba_pretrain.ops.selective_step import selective_step


class Mamba1(Mixer):
    """x -> (u, z); u is convolved; u -> (dt, B, C); the scan of u gated by z; projected out.

    ``dt_bias`` is a parameter of the mixer, not a bias of ``dt_proj``: it stays fp32 while projections run in bf16.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        d_inner, rank = config.d_inner, config.resolved_dt_rank
        self.in_proj = SplitProjection(config.d_model, (d_inner, d_inner), bias=config.use_bias)
        self.conv1d = CausalConv1d(d_inner, config.d_conv, config.use_conv_bias)
        self.x_proj = SideProjection(d_inner, rank + 2 * config.d_state, bias=False)
        self.dt_proj = Projection(rank, d_inner, bias=False)
        self.dt_bias = nn.Parameter(torch.empty(d_inner))
        self.A_log = nn.Parameter(torch.empty(d_inner, config.d_state))
        self.D = nn.Parameter(torch.empty(d_inner))
        self.out_proj = Projection(d_inner, config.d_model, bias=config.use_bias)

    def forward(self, x: Tensor, boundaries: Boundaries | None = None, state: State | None = None) -> Tensor:
        """See ``Mixer.forward``."""
        seq_idx = None if boundaries is None else boundaries.seq_idx
        u, z = self.in_proj(x)
        u = self.conv1d(u, seq_idx, state)
        u, projected = self.x_proj(u)
        dt, B, C = projected.split([self.config.resolved_dt_rank, self.config.d_state, self.config.d_state], dim=-1)
        if self.config.bcdt_rms:
            dt, B, C = (self._normalise(t) for t in (dt, B, C))
        if state is not None and u.shape[1] == 1:
            return self.out_proj(self._step(u, dt, B, C, z, state))
        return self.out_proj(self._scan(u, self.dt_proj(dt), B, C, z, seq_idx, state))

    def _normalise(self, t: Tensor) -> Tensor:
        return F.rms_norm(t.float(), (t.shape[-1],), eps=self.config.bcdt_rms_eps).to(t.dtype)

    def _scan(self, u: Tensor, dt: Tensor, B: Tensor, C: Tensor, z: Tensor, seq_idx: Tensor | None, state: State | None) -> Tensor:
        A, D, bias = -torch.exp(self.A_log.float()), self.D.float(), self.dt_bias.float()
        if state is None:
            return cast(Tensor, selective_scan(u, dt, A, B, C, D=D, z=z, delta_bias=bias, seq_idx=seq_idx))
        initial = state["ssm"].float() if state["started"] else None
        y, final = selective_scan(u, dt, A, B, C, D=D, z=z, delta_bias=bias, initial_state=initial, return_final_state=True)
        state["ssm"].copy_(final)
        state["started"] = True
        return y

    def _step(self, u: Tensor, dt: Tensor, B: Tensor, C: Tensor, z: Tensor, state: State) -> Tensor:
        """One token; the step's kernel projects ``dt`` as well."""

        def step(dt: Tensor, weight: Tensor) -> Tensor:
            return selective_step(u[:, 0], dt[:, 0], weight, self.A_log, B[:, 0], C[:, 0], self.D, z[:, 0], self.dt_bias, state["ssm"])

        state["started"] = True
        return self.dt_proj(dt, step).unsqueeze(1)

    def parameter_policy(self) -> Policies:
        """See ``Mixer.parameter_policy``; the initialisation is that of arXiv:2312.00752, section 3.6 and appendix E."""
        config = self.config
        scale = 1.0 / math.sqrt(config.n_residual) if config.rescale_prenorm_residual else 1.0
        dt_bias = distributions.inverse_softplus_time_step(config.time_step_min, config.time_step_max, config.time_step_floor)
        return {
            "A_log": ParameterPolicy(decay=False, fp32=True, init=distributions.log_arange()),
            "D": ParameterPolicy(decay=False, fp32=True, init=distributions.constant(1.0)),
            "dt_bias": ParameterPolicy(decay=False, fp32=True, init=dt_bias),
            "dt_proj.weight": ParameterPolicy(decay=True, fp32=False, init=distributions.uniform(config.resolved_dt_rank**-0.5)),
            **projection_policy("in_proj", self.in_proj),
            **projection_policy("x_proj", self.x_proj),
            **projection_policy("out_proj", self.out_proj, scale),
            **prefixed("conv1d", self.conv1d.parameter_policy()),
        }

    def flops_per_token(self, length: int) -> float:
        """See ``Mixer.flops_per_token``; the recurrence costs the same at every length."""
        projections = (self.in_proj, self.x_proj, self.dt_proj, self.out_proj)
        return (
            sum(flops.linear_flops(1, p.in_features, p.out_features) for p in projections)
            + flops.causal_conv1d_flops(1, self.config.d_inner, self.config.d_conv)
            + flops.selective_scan_flops(1, self.config.d_inner, self.config.d_state)
        )

    def new_state(
        self, batch: int, max_length: int, device: torch.device | str, dtype: torch.dtype, recurrent: torch.dtype = torch.float32
    ) -> State:
        """See ``Mixer.new_state``; its size does not depend on ``max_length``."""
        c = self.config
        conv = torch.zeros(batch, c.d_conv - 1, c.d_inner, device=device, dtype=dtype)
        return {"conv": conv, "ssm": torch.zeros(batch, c.d_inner, c.d_state, device=device, dtype=recurrent), "started": False}
