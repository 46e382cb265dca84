"""A decoding step recorded once and replayed: at one token a step, launching kernels costs more than running them."""

from __future__ import annotations

import torch
from torch import Tensor

from mamba_pretrain.models.language_model import LanguageModel
from mamba_pretrain.models.mixer import State

_WARM_UP = 3  # passes before recording, in which kernels are tuned and workspaces allocated


class GraphedStep:
    """``step(tokens)`` (b, 1) gives the logits (b, vocab_size) of the next token and moves ``state`` on; CUDA only.

    ``state`` must have read its prompt. The logits are one buffer that the next call overwrites.
    """

    def __init__(self, model: LanguageModel, state: list[State], batch: int, device: torch.device) -> None:
        self._tokens = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        buffers = [value for layer in state for value in layer.values() if torch.is_tensor(value)]
        saved = [buffer.clone() for buffer in buffers]
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                model(self._tokens, state=state, only_last=True)
        torch.cuda.current_stream(device).wait_stream(stream)
        # Warming up moved the state on; recording alone runs nothing.
        for buffer, value in zip(buffers, saved, strict=True):
            buffer.copy_(value)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._logits = model(self._tokens, state=state, only_last=True)[:, -1]

    def __call__(self, tokens: Tensor) -> Tensor:
        """Logits after ``tokens`` (b, 1)."""
        self._tokens.copy_(tokens)
        self._graph.replay()
        return self._logits
