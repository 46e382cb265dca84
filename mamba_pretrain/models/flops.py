"""Model FLOPs, counted honestly: what the algorithm needs, per token, forward; a multiply-add counts as 2.

Training costs three times the forward pass (backward is twice as much). Recomputation under activation checkpointing is not model FLOPs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mamba_pretrain.models.config import ModelConfig
    from mamba_pretrain.models.language_model import LanguageModel


def linear_flops(n_in: int, n_out: int) -> float:
    """A projection of one token."""
    return 2.0 * n_in * n_out


def selective_scan_flops(d_inner: int, d_state: int) -> float:
    """Mamba-1's scan: about 9 operations per channel and state (discretise, update, read out), the count mamba_ssm's authors use."""
    return 9.0 * d_inner * d_state


def ssd_flops(length: int, chunk: int, n_head: int, headdim: int, ngroups: int, d_state: int) -> float:
    """Mamba-2's chunked algorithm (arXiv:2405.21060, section 6.3): scores and values inside a chunk, states into and out of it."""
    chunk = min(chunk, length)
    inside = ngroups * chunk * d_state + n_head * chunk * headdim
    states = 2 * n_head * headdim * d_state
    passing = n_head * headdim * d_state / chunk
    return 2.0 * (inside + states + passing)


def attention_flops(length: int, n_head: int, headdim: int) -> float:
    """Causal scores and values: a token sees (length + 1) / 2 keys on average, and only those count."""
    return 2.0 * 2 * n_head * headdim * (length + 1) / 2


def conv_flops(channels: int, taps: int) -> float:
    """Depthwise convolution of one token."""
    return 2.0 * channels * taps


def forward_flops_per_token(model: LanguageModel, length: int) -> float:
    """FLOPs of a forward pass per token: every block and the output head; norms and activations are left out as everywhere."""
    config = model.config
    blocks = sum(block.flops_per_token(length) for block in model.blocks())
    return blocks + linear_flops(config.d_model, config.padded_vocab_size)


def training_flops_per_token(model: LanguageModel, length: int) -> float:
    """FLOPs of forward and backward per token."""
    return 3.0 * forward_flops_per_token(model, length)


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
        "forward": forward_flops_per_token(model, length),
        "training": training_flops_per_token(model, length),
        "six_n": six_n_per_token(model),
    }
