"""What is logged, how often, and where to."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class WandbConfig(BaseModel):
    """Weights & Biases; the run folder's ``metrics.jsonl`` stays the truth whatever happens here."""

    model_config = ConfigDict(extra="forbid")

    mode: Literal["offline", "online", "disabled"] = Field(
        "offline", description="offline: files under RUN/wandb for a later sync. online: stream. disabled: nothing"
    )
    project: str = Field("mamba-pretrain", min_length=1, description="project the run appears in")
    entity: str | None = Field(None, description="team or user; empty: the account's default")
    group: str | None = Field(None, description="group that ties related runs together")
    tags: list[str] = Field(default_factory=list, description="labels to filter runs by")
    notes: str | None = Field(None, description="free text shown beside the run")
    init_timeout: float = Field(60.0, gt=0.0, description="seconds to wait for the service before training goes on without it")


class MonitorConfig(BaseModel):
    """Logging of a run."""

    model_config = ConfigDict(extra="forbid")

    log_every: int = Field(10, ge=1, description="steps between train rows in metrics.jsonl, on the console and in W&B")
    layers_every: int | None = Field(
        None, ge=1, description="steps between per-layer statistics (dt, A, B, C, activations, gradients); empty: none"
    )
    console: Literal["auto", "rich", "plain", "off"] = Field(
        "auto", description="auto: a live line on a terminal, plain lines (at most 100 columns) in a log file"
    )
    fsync_seconds: float = Field(
        30.0, ge=0.0, description="metrics.jsonl is forced to disk at most this often (and at each evaluation and event); 0: every row"
    )
    peak_tflops: float | None = Field(
        None, gt=0.0, description="dense bf16 peak of one device for MFU; empty: looked up by the device's name, none on a CPU"
    )
    wandb: WandbConfig = Field(default_factory=WandbConfig)
