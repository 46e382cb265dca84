"""A run config as ``plan`` reads it, without a dataset on disk."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from mamba_pretrain.models.config import ModelConfig
from mamba_pretrain.optim.config import OptimConfig
from mamba_pretrain.parallel.config import ParallelConfig, PrecisionConfig
from mamba_pretrain.training.config import TrainConfig


@pytest.fixture
def run_config() -> Callable[..., Any]:
    """``run_config(mixer="mamba2", n_layer=24, d_model=768, batch=256, micro=16, ...)``."""

    def make(
        mixer: str = "mamba2",
        n_layer: int = 24,
        d_model: int = 768,
        batch: int = 256,
        micro: int = 16,
        length: int = 2048,
        lr: float = 3e-3,
        tokens: int = 300 * 10**9,
        strategy: str = "fsdp2",
        checkpointing: str = "none",
        compute: str = "bf16",
        **model: Any,
    ) -> Any:
        return SimpleNamespace(
            name=f"{mixer}-test",
            model=ModelConfig(mixer=mixer, n_layer=n_layer, d_model=d_model, **{"vocab_size": 50277, **model}),
            data=SimpleNamespace(sequence_length=length, sources=[]),
            train=TrainConfig(tokens=tokens, global_batch_size=batch, micro_batch_size=micro),
            optim=OptimConfig(lr=lr),
            parallel=ParallelConfig(strategy=strategy, activation_checkpointing=checkpointing),
            precision=PrecisionConfig(compute=compute),
            checkpoint=SimpleNamespace(keep_last=3),
        )

    return make
