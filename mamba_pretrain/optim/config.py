"""What the optimizer and its schedule are told."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class ScheduleConfig(BaseModel):
    """Learning rate as a function of the step; see ``schedule.py`` for the curves."""

    model_config = ConfigDict(extra="forbid")

    name: Literal["cosine", "wsd", "linear", "constant"] = Field("cosine", description="curve after the warm-up")
    warmup_steps: int | None = Field(None, ge=0, description="steps of linear warm-up from 0; overrides warmup_fraction")
    warmup_fraction: float = Field(0.1, ge=0.0, le=1.0, description="warm-up as a fraction of all steps")
    min_lr: float = Field(1e-5, ge=0.0, description="learning rate at the end of the decay")
    decay_fraction: float = Field(0.2, gt=0.0, le=1.0, description="wsd only: last fraction of all steps that decays")
    decay_shape: Literal["linear", "sqrt", "cosine"] = Field("sqrt", description="wsd only: shape of the decay")


class OptimConfig(BaseModel):
    """Optimizer: AdamW as in the Mamba papers, or Muon for the 2-D projections with AdamW for the rest."""

    model_config = ConfigDict(extra="forbid")

    name: Literal["adamw", "adamw8bit", "muon"] = Field("adamw", description="adamw8bit needs torchao; muon takes 2-D projections")
    lr: float = Field(1e-3, gt=0.0, description="peak learning rate")
    betas: tuple[float, float] = Field((0.9, 0.95), description="AdamW's decay of first and second moment")
    eps: float = Field(1e-8, gt=0.0, description="AdamW's epsilon")
    weight_decay: float = Field(0.1, ge=0.0, description="decay of 2-D projection and embedding weights; nothing else decays")
    max_grad_norm: float = Field(1.0, gt=0.0, description="global gradient norm is clipped to this")
    muon_lr: float = Field(0.02, gt=0.0, description="muon only: peak learning rate of the 2-D projections, same schedule")
    muon_momentum: float = Field(0.95, ge=0.0, lt=1.0, description="muon only: Nesterov momentum")
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig, description="learning-rate schedule")

    @model_validator(mode="after")
    def _min_under_peak(self) -> OptimConfig:
        if self.schedule.min_lr > self.lr:
            raise ValueError(f"schedule.min_lr {self.schedule.min_lr:g} is above lr {self.lr:g}; lower min_lr or raise lr")
        return self
