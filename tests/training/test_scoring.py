"""Losses by token and by context."""

from __future__ import annotations

import pytest
import torch

from mamba_pretrain.data.batch import IGNORE, Batch
from mamba_pretrain.models import init
from mamba_pretrain.models.boundaries import Boundaries
from mamba_pretrain.models.config import ModelConfig
from mamba_pretrain.models.language_model import LanguageModel
from mamba_pretrain.training.scoring import position_edges, position_losses, score_by_position, sum_by_position, token_losses


def test_token_losses_sum_to_the_cross_entropy():
    logits, labels = torch.randn(2, 5, 11), torch.randint(11, (2, 5))
    labels[0, 3] = IGNORE
    losses = token_losses(logits, labels)
    assert losses[0, 3] == 0
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    assert losses.sum() == pytest.approx(float(expected))


@pytest.mark.parametrize(("length", "edges"), [(1, [1, 2]), (6, [1, 2, 4, 7]), (8, [1, 2, 4, 8, 9])])
def test_position_edges_cover_every_context_once(length, edges):
    assert position_edges(length) == edges


def test_buckets_by_context():
    losses = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]])
    labels = torch.tensor([[7, 7, IGNORE, 7, 7, 7]])
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]])
    edges = position_edges(6)
    found = position_losses(sum_by_position(losses, labels, positions, edges), edges)
    assert [(b.first, b.last, b.loss, b.n_tokens) for b in found] == [(1, 1, 2.5, 2), (2, 3, pytest.approx(13 / 3), 3)]


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    model = LanguageModel(ModelConfig(mixer="mamba2", vocab_size=40, d_model=32, n_layer=2, d_state=16, headdim=16, chunk_size=16))
    init.initialize(model, 0)
    return model.eval()


def random_batch(length: int) -> Batch:
    tokens = torch.randint(40, (3, length), generator=torch.Generator().manual_seed(1))
    labels = torch.roll(tokens, -1, 1)
    seq_idx = (torch.arange(length) >= length // 3).int().repeat(3, 1)
    labels[:, length // 3 - 1] = IGNORE
    positions = Boundaries.from_seq_idx(seq_idx).positions
    return Batch(tokens, labels, seq_idx, positions, int((labels != IGNORE).sum()), torch.arange(3))


@pytest.mark.parametrize("isolate", [True, False])
def test_score_by_position_adds_up_to_the_models_loss(model, isolate):
    batch = random_batch(24)
    buckets = score_by_position(model, [batch, batch], 24, isolate_documents=isolate)
    boundaries = Boundaries(batch.seq_idx, batch.positions) if isolate else None
    with torch.no_grad():
        expected = 2 * float(model(batch.tokens, boundaries, batch.labels))
    assert sum(bucket.n_tokens for bucket in buckets) == 2 * batch.n_valid
    assert sum(bucket.loss * bucket.n_tokens for bucket in buckets) == pytest.approx(expected, rel=1e-5)
    assert buckets[-1].last == (16 if isolate else 24) or buckets[-1].first <= 24 <= buckets[-1].last
