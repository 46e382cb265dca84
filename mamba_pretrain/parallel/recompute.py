"""Activation checkpointing: what is kept for the backward pass and what is computed again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.distributed._composable import checkpoint
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from mamba_pretrain.models.language_model import LanguageModel

# Kept under `selective`: the results of the expensive operations. Norms, activations, gates and casts are computed again.
EXPENSIVE = ("aten::mm", "aten::addmm", "aten::_scaled_dot_product_flash_attention", "aten::_scaled_dot_product_efficient_attention")


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
    ours = name.startswith("mamba_pretrain::")
    return CheckpointPolicy.MUST_SAVE if ours or name.split(".")[0] in EXPENSIVE else CheckpointPolicy.PREFER_RECOMPUTE
