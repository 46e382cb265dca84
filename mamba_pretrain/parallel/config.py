"""How the model is spread over processes, and in which precision it computes."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

# DeepSpeed decides in Python, pass by pass, what it exchanges: that cannot be replayed.
GRAPHED = ("single", "ddp", "fsdp2", "hsdp")


class ParallelConfig(BaseModel):
    """Engine and mesh."""

    model_config = ConfigDict(extra="forbid")

    strategy: Literal["auto", "single", "ddp", "fsdp2", "hsdp", "zero1", "zero2", "zero3"] = Field(
        "auto",
        description="auto: single for one process, else fsdp2; hsdp shards inside groups of hsdp_shard_size and replicates between them",
    )
    hsdp_shard_size: int | None = Field(None, ge=1, description="hsdp: processes that share one copy; empty: those of one node")
    reshard_after_forward: bool = Field(True, description="fsdp2, hsdp: free gathered weights between forward and backward (less memory)")
    activation_checkpointing: Literal["none", "selective", "projections", "block"] = Field(
        "none",
        description="recompute in the backward pass: selective all but the scans' and projections' outputs, projections all but theirs, "
        "block whole blocks",
    )
    cuda_graphs: Literal["auto", "on", "off"] = Field(
        "auto",
        description="single, ddp, fsdp2, hsdp on GPUs: record forward and backward pass once and replay them, so that no kernel waits for Python; "
        "auto: where possible",
    )
    reduce_dtype: Literal["fp32", "bf16"] = Field(
        "fp32", description="dtype in which gradients are summed over processes; bf16 halves the traffic (zero3: of weights too), not ddp"
    )
    cpu_offload: bool = Field(False, description="fsdp2, zero2, zero3: keep parameters and optimizer state in host memory")
    zero_hpz_partition_size: int = Field(1, ge=1, description="zero3: ZeRO++ secondary shards within groups of this many processes; 1: off")
    deepspeed: dict[str, Any] = Field(default_factory=dict, description="zero1-3: keys merged over the generated DeepSpeed config")
    timeout_minutes: float = Field(30.0, gt=0.0, description="a collective that takes longer ends the process")

    @field_validator("cuda_graphs", mode="before")
    @classmethod
    def _word(cls, value: Any) -> Any:
        return _on_or_off(value)


class PrecisionConfig(BaseModel):
    """Parameters and optimizer state are fp32 always."""

    model_config = ConfigDict(extra="forbid")

    compute: Literal["bf16", "fp32"] = Field(
        "bf16", description="dtype of matmuls; A_log, D, dt_bias and norm weights are used in fp32 always"
    )
    fp8: Literal["off", "tensorwise", "rowwise", "blockwise"] = Field(
        "off",
        description="8-bit matmuls in in_proj, out_proj, qkv_proj and the MLP (training only; not head, x_proj, dt_proj), with one scale per "
        "tensor, per row, or per 128 values of a row (Hopper only); needs compute=bf16",
    )

    @field_validator("fp8", mode="before")
    @classmethod
    def _word(cls, value: Any) -> Any:
        return _on_or_off(value)

    @model_validator(mode="after")
    def _check(self) -> PrecisionConfig:
        if self.fp8 != "off" and self.compute != "bf16":
            raise ValueError(f"fp8={self.fp8} replaces matmuls in bf16; set compute=bf16 or fp8=off")
        return self


def graphs_unsupported(parallel: ParallelConfig, strategy: str, device: str) -> str | None:
    """What CUDA graphs need and this run has not, in words, or None."""
    if strategy not in GRAPHED:
        return f"parallel.strategy={', '.join(GRAPHED[:-1])} or {GRAPHED[-1]}, not {strategy}"
    if device != "cuda":
        return f"a CUDA device, not {device}"
    if parallel.cpu_offload:
        return "gradients that stay on the GPU, not parallel.cpu_offload=true"
    return None


def _on_or_off(value: Any) -> Any:
    """YAML reads a bare ``on`` and ``off`` as true and false."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value
