"""When checkpoints are saved, how, and which are kept."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class CheckpointConfig(BaseModel):
    """Checkpoints live in ``RUN/checkpoints``; the last one is always kept."""

    model_config = ConfigDict(extra="forbid")

    every_steps: int | None = Field(1000, ge=1, description="save at these steps, and always when the run stops; null: only when it stops")
    keep_last: int = Field(3, ge=1, description="newest checkpoints to keep")
    keep_every: int | None = Field(None, ge=1, description="keep the checkpoints of these steps for good")
    async_save: bool = Field(True, description="copy to host memory, then write in the background while training goes on")
    verify: bool = Field(True, description="compare checksums before a checkpoint is loaded; the processes share the files")
    timeout: float = Field(1800.0, gt=0.0, description="seconds to wait for the other processes' files before a save is given up")
    remote: str | None = Field(
        None,
        description="fsspec URL of a folder, for example s3://bucket/runs/NAME, to which every checkpoint is copied as well, and from which the "
        "run resumes when its own folder holds none",
    )
