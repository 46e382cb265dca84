"""Activation checkpointing: what is kept for the backward pass and what is computed again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.distributed._composable import checkpoint
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from mamba_pretrain.models.language_model import LanguageModel

# Kept under `selective`: results of matmuls, scans and attention, by the beginning of the operator's name. Convolutions, norms, gates, activations
# and casts are bound by memory traffic, not arithmetic: they are computed again. A kernel that is no PyTorch operator (mamba_ssm's) cannot be
# told apart and is computed again too.
EXPENSIVE = (
    "aten::mm",
    "aten::addmm",
    "aten::_scaled_mm",
    "mamba_pretrain::fp8_matmul",
    "aten::_scaled_dot_product",
    "mamba_pretrain::selective_scan",
    "mamba_pretrain::ssd_scan",
    "mamba_pretrain::c_scan",
    "mamba_pretrain::c_ssd",
    "mamba_pretrain::cuda_scan",
)


def recompute(model: LanguageModel, mode: str) -> None:
    """Marks every block of ``model``. ``none``: keep all; ``block``: keep block inputs; ``selective``: keep expensive results as well."""
    if mode == "none":
        return
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if mode == "selective":
        options["context_fn"] = lambda: create_selective_checkpoint_contexts(_policy)
    apply: Callable[..., Any] = checkpoint
    for block in model.blocks():
        apply(block, **options)


def _policy(context: Any, operation: Any, *arguments: Any, **named: Any) -> CheckpointPolicy:
    name = operation.name() if isinstance(operation, torch._ops.OpOverload) else str(operation)
    return CheckpointPolicy.MUST_SAVE if name.startswith(EXPENSIVE) else CheckpointPolicy.PREFER_RECOMPUTE
