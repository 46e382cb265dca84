"""What the loop, its evaluation and its spike guard are told."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class BatchRamp(BaseModel):
    """The global batch grows from ``start`` by ``increment`` samples in equal stages over ``steps`` steps (as Falcon-Mamba's)."""

    model_config = ConfigDict(extra="forbid")

    start: int = Field(ge=1, description="samples in the first global batch")
    increment: int = Field(ge=1, description="samples added at each stage; a multiple of world size x micro-batch")
    steps: int = Field(ge=1, description="steps until the full global batch is reached")


class SpikeConfig(BaseModel):
    """What to do when a loss or gradient norm is not finite, or jumps far above its recent values."""

    model_config = ConfigDict(extra="forbid")

    action: Literal["stop", "skip", "rollback", "ignore"] = Field(
        "stop",
        description="stop: end the run on a non-finite loss. skip: leave the update of a spiking step out. rollback: return to the last "
        "checkpoint and pass over the data since. ignore: only log. skip and rollback read the gradient norm before each update",
    )
    sigma: float = Field(8.0, gt=0.0, description="a value this many standard deviations above its recent mean is a spike")
    window: int = Field(64, ge=8, description="recent steps that define mean and deviation")
    max_events: int = Field(10, ge=1, description="more skips or rollbacks than this end the run")


class TrainConfig(BaseModel):
    """Length of the run and shape of its batches."""

    model_config = ConfigDict(extra="forbid")

    steps: int | None = Field(None, ge=1, description="optimizer steps; give this or tokens")
    tokens: int | None = Field(None, ge=1, description="training tokens; rounded up to whole steps")
    global_batch_size: int | None = Field(None, ge=1, description="sequences a step over all ranks; give this or global_batch_tokens")
    global_batch_tokens: int | None = Field(None, ge=1, description="tokens a step over all ranks; rounded to whole sequences")
    micro_batch_size: int = Field(1, ge=1, description="sequences a rank processes at once; gradient accumulation fills the global batch")
    batch_ramp: BatchRamp | None = Field(None, description="grow the global batch over the first steps")
    stop_after: int | None = Field(
        None, ge=1, description="stop, with a checkpoint, after this step as a time limit would; schedules still see all steps"
    )
    resume: Literal["auto", "require", "never"] = Field(
        "auto",
        description="auto: continue from the run folder's last checkpoint if there is one; require: fail without one; never: start anew",
    )
    init_from: str | None = Field(
        None, description="run folder or checkpoint whose weights start a new run (optimizer and data start fresh)"
    )
    resume_guard: bool = Field(True, description="compare the first losses after a resume with those before it and stop on a jump")
    spikes: SpikeConfig = Field(default_factory=SpikeConfig, description="non-finite or jumping loss and gradient norm")
    deterministic: bool = Field(False, description="ask torch for deterministic kernels; slower on GPUs")
    profile_steps: str | None = Field(
        None, pattern=r"^\d+-\d+$", description="steps to profile, such as 10-12; writes a trace to the run folder"
    )
    gc_every: int = Field(
        100,
        ge=0,
        description="collect garbage at these steps only, on all ranks at once, so that none stalls the others; 0: Python decides",
    )
    hang_timeout: float = Field(
        1800.0, gt=0.0, description="seconds without progress of a rank after which the watchdog reports and requeues"
    )

    @model_validator(mode="after")
    def _one_of_each(self) -> TrainConfig:
        if (self.steps is None) == (self.tokens is None):
            raise ValueError("give exactly one of steps and tokens")
        if (self.global_batch_size is None) == (self.global_batch_tokens is None):
            raise ValueError("give exactly one of global_batch_size and global_batch_tokens")
        return self


class EvaluationConfig(BaseModel):
    """Validation during training."""

    model_config = ConfigDict(extra="forbid")

    every_steps: int | None = Field(None, ge=1, description="evaluate at these steps; empty: only at the end")
    at_end: bool = Field(True, description="evaluate after the last step")
    max_samples: int | None = Field(None, ge=1, description="sequences per evaluation; empty: the whole validation split")
    prompts: list[str] = Field(
        default_factory=list, description="texts to continue at each evaluation; the result goes to metrics and report"
    )
    max_new_tokens: int = Field(64, ge=1, description="tokens generated per prompt")
