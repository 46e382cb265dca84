"""Activation checkpointing: what is kept for the backward pass and what is computed again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.distributed._composable import checkpoint
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from mamba_pretrain.models.language_model import LanguageModel

# Kept beside a block's inputs, by the beginning of the operator's name. Everything else is bound by memory traffic, not arithmetic, and is computed
# again: convolutions, norms, gates, activations, casts. A kernel that is no PyTorch operator (mamba_ssm's) cannot be told apart and is computed
# again too.
PROJECTIONS = ("aten::mm", "aten::addmm", "aten::_scaled_mm", "mamba_pretrain::fp8_matmul", "aten::_scaled_dot_product")
SCANS = (
    "mamba_pretrain::selective_scan",
    "mamba_pretrain::ssd_scan",
    "mamba_pretrain::c_scan",
    "mamba_pretrain::c_ssd",
    "mamba_pretrain::cuda_scan",
    "mamba_pretrain::triton_ssd",
)
KEPT = {"selective": PROJECTIONS + SCANS, "projections": PROJECTIONS}
# A product whose inner dimension is shorter costs its result's traffic, not arithmetic: no GPU does more operations in the time of writing a number.
# Mamba-1's dt_proj is one: d_inner outputs from a rank of d_model / 16.
SHORTEST_INNER = 256


def recompute(model: LanguageModel, mode: str) -> None:
    """Marks every block of ``model``. ``none``: keep all; ``block``: keep block inputs; else what ``KEPT`` names as well."""
    if mode == "none":
        return
    apply: Callable[..., Any] = checkpoint
    for block in model.blocks():
        apply(block, **checkpoint_options(mode))


def checkpoint_options(mode: str, policy: Callable[..., CheckpointPolicy] | None = None) -> dict[str, Any]:
    """Options of torch's checkpoint for a mode; ``policy`` instead of the mode's own."""
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if mode in KEPT:
        options["context_fn"] = lambda: create_selective_checkpoint_contexts(policy or policy_of(mode))
    return options


def policy_of(mode: str) -> Callable[..., CheckpointPolicy]:
    """Says of an operator's call whether its result is kept."""

    def policy(context: Any, operation: Any, *arguments: Any, **named: Any) -> CheckpointPolicy:
        name = operation.name() if isinstance(operation, torch._ops.OpOverload) else str(operation)
        expensive = name.startswith(KEPT[mode])
        if name in ("aten::mm", "aten::addmm"):
            expensive = arguments[-1].shape[0] >= SHORTEST_INNER
        return CheckpointPolicy.MUST_SAVE if expensive else CheckpointPolicy.PREFER_RECOMPUTE

    return policy
