"""Validation: mean loss per token over the same samples every time, whatever the engine and world size."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from mamba_pretrain.training.step import all_reduce_sum

if TYPE_CHECKING:
    from mamba_pretrain.data.batch import Batch
    from mamba_pretrain.parallel.engine import Engine


@dataclass(frozen=True)
class Evaluation:
    """Loss in nats per token over ``n_tokens`` valid tokens."""

    loss: float
    n_tokens: int

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite when it overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    def bits_per_byte(self, bytes_per_token: float | None) -> float | None:
        """The loss in bits over the text's bytes, which compares across tokenizers; None when the dataset does not record its bytes."""
        return self.loss / math.log(2) / bytes_per_token if bytes_per_token else None


def evaluate(engine: Engine, batches: Iterable[Batch]) -> Evaluation:
    """Mean token loss over all ranks' batches; every rank must pass the same number of batches."""
    totals = torch.zeros(2, dtype=torch.float64, device=engine.topology.device)
    for batch in batches:
        totals[0] += engine.evaluate(batch).double()
        totals[1] += batch.n_valid
    loss, tokens = all_reduce_sum(totals).tolist()
    return Evaluation(loss / max(1.0, tokens), int(tokens))


def unigram_loss(train_counts: np.ndarray, targets: np.ndarray) -> float:
    """Nats per token of a unigram model with add-one smoothing: the floor that any language model must be well under.

    ``train_counts`` (vocab,) counts the training tokens, ``targets`` (n,) holds the validation targets.
    """
    smoothed = train_counts.astype(np.float64) + 1.0
    log_probabilities = np.log(smoothed / smoothed.sum())
    return float(-log_probabilities[targets].mean())
