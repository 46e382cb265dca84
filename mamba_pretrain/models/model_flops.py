"""FLOPs of a whole model, counted honestly: what the algorithm needs, per token, forward; a multiply-add counts as 2.

Training costs three times the forward pass (backward is twice as much). Recomputation under activation checkpointing is not model FLOPs.
The formulas of single operations are those of ``ops/flops.py``, which also tells them to torch's counter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mamba_pretrain.models.config import ModelConfig
    from mamba_pretrain.models.language_model import LanguageModel


def training_flops_per_token(model: LanguageModel, length: int) -> float:
    """FLOPs of forward and backward per token."""
    return 3.0 * model.flops_per_token(length)


def six_n_per_token(model: LanguageModel) -> float:
    """The usual estimate 6N, so that others' figures compare. N leaves out an embedding that only looks up (untied)."""
    config = model.config
    lookup = 0 if config.tie_word_embeddings else config.padded_vocab_size * config.d_model
    return 6.0 * (model.n_parameters() - lookup)


def describe(config: ModelConfig, length: int) -> dict[str, float]:
    """Parameters and FLOPs per token of a config, from the meta device: keys parameters, forward, training, six_n."""
    import torch

    from mamba_pretrain.models.language_model import LanguageModel

    with torch.device("meta"):
        model = LanguageModel(config)
    return {
        "parameters": float(model.n_parameters()),
        "forward": model.flops_per_token(length),
        "training": training_flops_per_token(model, length),
        "six_n": six_n_per_token(model),
    }
