"""Finer looks at a validation loss: per token, by the length of the context."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mamba_pretrain.data.batch import IGNORE, Batch
from mamba_pretrain.models.boundaries import Boundaries


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Loss in nats of each target, (b, l) fp32, 0 where ``labels`` (b, l) is -100; ``logits`` (b, l, vocab)."""
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="none").view_as(
        labels
    )


@dataclass(frozen=True)
class PositionLoss:
    """Mean loss in nats over the targets with ``first`` ... ``last`` tokens of their document before them, both included."""

    first: int
    last: int
    loss: float
    n_tokens: int


def position_edges(length: int) -> list[int]:
    """Bounds of buckets that double in width: 1, 2, 4, ... up to ``length`` tokens of context, and one past it."""
    return [*(1 << i for i in range(max(1, length).bit_length())), length + 1]


def sum_by_position(losses: Tensor, labels: Tensor, positions: Tensor, edges: Sequence[int]) -> Tensor:
    """Sums and counts, (2, len(edges) - 1) fp64, of the losses (b, l) of valid targets by the context they are predicted from.

    ``positions`` (b, l) count a token's predecessors in its document, so that its target has one token more. Bucket i holds targets with
    ``edges[i]`` to ``edges[i + 1] - 1`` tokens of context. Add the results of several batches up, and pass them to ``position_losses``.
    """
    valid = labels != IGNORE
    bounds = torch.tensor(edges[1:-1], device=positions.device)
    bucket = torch.bucketize(positions[valid] + 1, bounds, right=True)
    totals = torch.zeros(2, len(edges) - 1, dtype=torch.float64, device=losses.device)
    totals[0].index_add_(0, bucket, losses[valid].double())
    totals[1].index_add_(0, bucket, torch.ones_like(bucket, dtype=torch.float64))
    return totals


def position_losses(totals: Tensor, edges: Sequence[int]) -> list[PositionLoss]:
    """Buckets with at least one target, from the totals (2, len(edges) - 1) of ``sum_by_position``."""
    sums, counts = totals.tolist()
    buckets = zip(edges, edges[1:], sums, counts, strict=False)
    return [PositionLoss(first, end - 1, total / count, int(count)) for first, end, total, count in buckets if count]


@torch.no_grad()
def score_by_position(
    model: nn.Module, batches: Iterable[Batch], length: int, device: torch.device | str = "cpu", isolate_documents: bool = True
) -> list[PositionLoss]:
    """Loss of a ``LanguageModel`` by length of context over validation batches of sequences of ``length``.

    Does the loss keep falling with more context? With ``isolate_documents=False`` state runs on over documents, and the context is the
    whole sequence before a target. One sequence is scored at a time: the logits of a batch would not fit.
    """
    edges = position_edges(length)
    totals = torch.zeros(2, len(edges) - 1, dtype=torch.float64)
    for batch in batches:
        for row in range(len(batch.tokens)):
            one = batch.rows(slice(row, row + 1)).map(lambda tensor: tensor.to(device))
            boundaries = Boundaries(one.seq_idx, one.positions) if isolate_documents else None
            positions = one.positions if isolate_documents else torch.arange(length, device=device).unsqueeze(0)
            losses = token_losses(model(one.tokens, boundaries), one.labels)
            totals += sum_by_position(losses, one.labels, positions, edges).cpu()
    return position_losses(totals, edges)
