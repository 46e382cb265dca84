"""DeepSpeed: its JSON from our config, and its import without surprises."""

from __future__ import annotations

import logging
import os
from typing import Any

import torch

from data_tools.errors import UserError
from mamba_pretrain.models.modules import PROJECTIONS
from mamba_pretrain.parallel.config import ParallelConfig, PrecisionConfig

FIRST_MAX_NORM = 1.0  # the real one arrives with every step; DeepSpeed only wants to know at the start that there is one

# Keys of DeepSpeed's JSON whose job is done elsewhere, with the setting that does it.
ELSEWHERE = {
    "bf16": "precision.compute=bf16, which keeps A_log, D and dt_bias in fp32",
    "fp16": "precision.compute=bf16, which keeps A_log, D and dt_bias in fp32",
    "optimizer": "the section optim",
    "scheduler": "optim.schedule",
    "gradient_clipping": "optim.max_grad_norm",
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size and train.micro_batch_size",
    "activation_checkpointing": "parallel.activation_checkpointing",
    "gradient_allreduce_op": "its default: whatever the engine, gradients are those of the mean loss over all processes' tokens",
}


def bucket_elements(n_parameters: int) -> int:
    """Elements of DeepSpeed's buckets of gradients: its default, but no more than there are. It allocates whole buckets, two with overlap."""
    return min(500_000_000, n_parameters)


def zero_config(stage: int, parallel: ParallelConfig, precision: PrecisionConfig, n_parameters: int) -> dict[str, Any]:
    """The JSON of a stage, with ``parallel.deepspeed`` merged over it. Raises UserError for keys that are set elsewhere."""
    zero: dict[str, Any] = {"stage": stage, "overlap_comm": torch.cuda.is_available(), "contiguous_gradients": True}
    zero["reduce_bucket_size"] = bucket_elements(n_parameters)
    if stage == 3:
        zero |= {"zero_hpz_partition_size": parallel.zero_hpz_partition_size}
    if parallel.cpu_offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    # DeepSpeed communicates the gradients (stage 3: the weights too) of the classes named here in bf16.
    low = [f"{c.__module__}.{c.__qualname__}" for c in PROJECTIONS] if parallel.reduce_dtype == "bf16" else []
    autocast = {"enabled": precision.compute == "bf16", "dtype": "bfloat16", "lower_precision_safe_modules": low}
    config = {
        "train_micro_batch_size_per_gpu": 1,  # batches are ours; DeepSpeed only divides by these
        "gradient_accumulation_steps": 1,
        "gradient_clipping": FIRST_MAX_NORM,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "torch_autocast": autocast,
        "steps_per_print": 10**9,
    }
    for key, where in ELSEWHERE.items():
        if key in parallel.deepspeed:
            raise UserError(f"parallel.deepspeed.{key} is not DeepSpeed's to decide here; remove it and use {where}")
    return merged(config, parallel.deepspeed)


def merged(config: dict[str, Any], override: dict[str, Any]) -> dict[str, Any]:
    """``override`` over ``config``, key by key at every depth."""
    result = dict(config)
    for key, value in override.items():
        result[key] = merged(result[key], value) if isinstance(value, dict) and isinstance(result.get(key), dict) else value
    return result


def import_deepspeed(device_type: str) -> Any:
    """DeepSpeed, quiet, on the right accelerator, without the 45 s compilation of a CPU collective that gloo serves as well."""
    if device_type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    try:
        import deepspeed
        import deepspeed.ops
    except ImportError as error:
        raise UserError(f"parallel.strategy zero1-3 needs DeepSpeed, which cannot be imported ({error}); pip install deepspeed") from error
    if device_type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
