"""The language model: embedding, blocks, norm, head."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn

from mamba_pretrain.models.block import Block
from mamba_pretrain.models.boundaries import Boundaries
from mamba_pretrain.models.config import ModelConfig
from mamba_pretrain.models.mixer import ParameterPolicy, State
from mamba_pretrain.models.modules import RMSNorm, TokenTable, prefixed
from mamba_pretrain.ops.flops import linear_flops


class LanguageModel(nn.Module):
    """A stack of blocks over token embeddings.

    Builds under ``torch.device("meta")``; ``init.initialize`` gives the parameters their values.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        rows = config.padded_vocab_size
        self.embedding = TokenTable(rows, config.d_model, config.vocab_size, config.initializer_range)
        self.layers = nn.ModuleList(Block(config, mixer) for mixer in config.layer_mixers)
        self.norm_f = RMSNorm(config.d_model, config.layer_norm_epsilon)
        if not config.tie_word_embeddings:
            self.lm_head = TokenTable(rows, config.d_model, config.vocab_size, config.initializer_range)
        # Kept because a sharding engine may later show only its part of a parameter.
        self.parameter_shapes = {name: tuple(parameter.shape) for name, parameter in self.named_parameters()}

    def forward(
        self,
        tokens: Tensor,
        boundaries: Boundaries | None = None,
        labels: Tensor | None = None,
        state: list[State] | None = None,
        only_last: bool = False,
    ) -> Tensor:
        """Logits (b, l, vocab_size) of ``tokens`` (b, l), or with ``labels`` (b, l) the fp32 sum of token losses.

        ``labels`` are already shifted and hold -100 where ignored. ``state`` (from ``new_state``) is continued and updated in place, and
        excludes ``boundaries``. ``only_last`` computes the logits of the last token alone: (b, 1, vocab_size).
        """
        if state is not None and boundaries is not None:
            raise ValueError("a state continues one document per row; boundaries cannot be given with it")
        hidden, residual = self.embedding(tokens), None
        for i, block in enumerate(self.layers):
            hidden, residual = block(hidden, residual, boundaries, None if state is None else state[i])
        hidden, _ = self.norm_f(hidden, residual)
        return self.head(hidden[:, -1:] if only_last else hidden, labels)

    @property
    def head(self) -> TokenTable:
        """What turns hidden states into logits or losses; the embedding, where weights are tied."""
        return self.embedding if self.config.tie_word_embeddings else self.lm_head

    def blocks(self) -> Iterator[Block]:
        """The blocks, typed."""
        return (cast(Block, layer) for layer in self.layers)

    def parameter_policies(self) -> dict[str, ParameterPolicy]:
        """The policy of every parameter by its full name. Raises ValueError unless every parameter has exactly one."""
        policies: dict[str, ParameterPolicy] = {}
        _collect(self, "", policies)
        if policies.keys() != self.parameter_shapes.keys():
            odd = sorted(policies.keys() ^ self.parameter_shapes.keys())
            raise ValueError(f"parameters and policies differ at {', '.join(odd)}: every module that owns parameters must classify them")
        return policies

    def n_parameters(self) -> int:
        """Number of parameters, padded vocabulary included; a tied head counts once."""
        return sum(torch.Size(shape).numel() for shape in self.parameter_shapes.values())

    def flops_per_token(self, length: int) -> float:
        """FLOPs of the forward pass per token: every block and the head; norms and activations are left out as everywhere.

        See ``model_flops.py`` for training and for 6N.
        """
        config = self.config
        return sum(block.flops_per_token(length) for block in self.blocks()) + linear_flops(1, config.d_model, config.padded_vocab_size)

    def new_state(
        self,
        batch: int,
        max_length: int,
        device: torch.device | str,
        dtype: torch.dtype = torch.float32,
        recurrent: torch.dtype = torch.float32,
    ) -> list[State]:
        """Empty decoding states of all layers for ``batch`` sequences, see ``Mixer.new_state``; only attention's grow with ``max_length``."""
        return [block.mixer.new_state(batch, max_length, device, dtype, recurrent) for block in self.blocks()]


def _collect(module: nn.Module, prefix: str, policies: dict[str, ParameterPolicy]) -> None:
    for name, child in module.named_children():
        full = f"{prefix}.{name}" if prefix else name
        declare = getattr(child, "parameter_policy", None)
        if declare is None:
            _collect(child, full, policies)
        else:
            policies.update(prefixed(full, declare()))
