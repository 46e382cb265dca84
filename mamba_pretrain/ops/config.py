"""What the ops are told: which implementation must serve, and whether a slow one may."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class OpsConfig(BaseModel):
    """Choice of implementations; left alone, the fastest that can serve a call is taken and logged once."""

    model_config = ConfigDict(extra="forbid")

    require: str | dict[str, str] = Field(
        default_factory=dict,
        description="implementation that must serve: one name for every op that has it (mamba_ssm), or op: name; refuses what it cannot do",
    )
    allow_slow: bool = Field(False, description="on CUDA, let an op fall to its slow pure-PyTorch reference instead of stopping")
