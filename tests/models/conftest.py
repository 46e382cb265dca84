"""Small models of every kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mamba_pretrain.models import init
from mamba_pretrain.models.boundaries import Boundaries
from mamba_pretrain.models.config import ModelConfig
from mamba_pretrain.models.language_model import LanguageModel

SMALL: dict[str, dict[str, Any]] = {
    "mamba1": {"mixer": "mamba1", "d_state": 8},
    "falcon": {"mixer": "mamba1", "d_state": 8, "bcdt_rms": True, "tie_word_embeddings": False},
    "mamba2": {"mixer": "mamba2", "d_state": 16, "headdim": 16, "ngroups": 2, "chunk_size": 16},
    "attention": {"mixer": "attention", "n_head": 4, "n_kv_head": 2, "d_intermediate": 96},
    "hybrid": {
        "pattern": "mamba2, mamba1, attention",
        "d_state": 16,
        "headdim": 16,
        "chunk_size": 16,
        "n_head": 4,
        "n_kv_head": 2,
        "d_intermediate": 96,
        "rotary_dim": 8,
    },
}


@pytest.fixture
def small_config() -> Callable[..., ModelConfig]:
    """``small_config(kind, **changes)``: three layers of width 32, 61 tokens padded to 64."""

    def make(kind: str, **changes: Any) -> ModelConfig:
        shape = {"vocab_size": 61, "pad_vocab_size_multiple": 16, "d_model": 32, "n_layer": 3}
        return ModelConfig.model_validate(shape | SMALL[kind] | changes)

    return make


@pytest.fixture
def randomized() -> Callable[..., LanguageModel]:
    """``randomized(config)``: a model whose every parameter differs from its usual initial value, so that no term hides behind a 0 or 1."""

    def make(config: ModelConfig, seed: int = 0) -> LanguageModel:
        model = LanguageModel(config)
        init.initialize(model, seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.empty(parameter.shape).uniform_(-0.1, 0.1, generator=generator))
        return model

    return make


@pytest.fixture
def two_documents() -> Callable[[int, int, int], Boundaries]:
    """``two_documents(batch, length, cut)``: every row holds two documents; the second begins at ``cut``."""

    def make(batch: int, length: int, cut: int) -> Boundaries:
        seq_idx = (torch.arange(length) >= cut).to(torch.int32).expand(batch, length)
        return Boundaries.from_seq_idx(seq_idx)

    return make
