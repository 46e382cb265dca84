"""The probes have the answers they claim, are the same every time, and tell a model that copies from one that does not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from data_tools.errors import UserError
from mamba_pretrain.data.batch import IGNORE
from mamba_pretrain.models import init
from mamba_pretrain.models.config import ModelConfig
from mamba_pretrain.models.language_model import LanguageModel
from mamba_pretrain.training import probes

VOCABULARY = torch.arange(3, 200)


class Copier(nn.Module):
    """Predicts what followed the longest match of the last tokens earlier in the sequence: answers every probe."""

    def __init__(self, order: int) -> None:
        super().__init__()
        self.order = order

    def forward(self, tokens: Tensor) -> Tensor:
        logits = torch.zeros(*tokens.shape, 200)
        for row, sequence in enumerate(tokens.tolist()):
            for end in range(self.order, len(sequence) + 1):
                tail = sequence[end - self.order : end]
                for begin in range(end - self.order):
                    if sequence[begin : begin + self.order] == tail:
                        logits[row, end - 1, sequence[begin + self.order]] = 20.0
                        break
        return logits


class Uniform(nn.Module):
    """Knows nothing."""

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.zeros(*tokens.shape, 200)


ALL = {
    "induction": (lambda: probes.induction(VOCABULARY, 12, n=3), 1),
    "associative_recall": (lambda: probes.associative_recall(VOCABULARY, 5, n=3), 1),
    "needle": (lambda: probes.needle(VOCABULARY, 60, 0.3, n=3), 4),
}


@pytest.mark.parametrize("name", ALL)
def test_answers_are_in_the_sequence_and_nowhere_else(name):
    make, order = ALL[name]
    probe = make()
    assert probe.name == name
    copied = probes.run_probe(Copier(order), probe, batch_size=2)
    assert copied.accuracy == 1.0
    assert copied.loss < 1e-3
    assert copied.n_answers == (probe.labels != IGNORE).sum()
    ignorant = probes.run_probe(Uniform(), probe)
    assert ignorant.accuracy < 0.1
    assert ignorant.loss == pytest.approx(torch.tensor(200.0).log().item())


@pytest.mark.parametrize("name", ALL)
def test_the_same_sequences_every_time(name):
    make, _ = ALL[name]
    torch.manual_seed(0)
    first = make()
    torch.manual_seed(1)
    second = make()
    assert torch.equal(first.tokens, second.tokens)
    assert torch.equal(first.labels, second.labels)
    assert set(first.tokens.flatten().tolist()) <= set(VOCABULARY.tolist())


@pytest.mark.parametrize(("depth", "place"), [(0.0, 0), (0.5, 26), (1.0, 51)])
def test_the_needle_lies_at_its_depth(depth, place):
    probe = probes.needle(VOCABULARY, 60, depth, n=4)
    assert probe.tokens.shape == (4, 60)
    assert torch.equal(probe.tokens[:, place : place + 4], probe.tokens[:, -4:])
    assert torch.equal(probe.tokens[:, place + 4], probe.labels[:, -1])


def test_a_haystack_of_real_text():
    text = torch.arange(1000)
    probe = probes.needle(VOCABULARY, 60, 1.0, n=4, haystack=text)
    hay = probe.tokens[:, :51]
    assert torch.equal(hay, hay[:, :1] + torch.arange(51))


def test_standard_probes_fit_the_length():
    found = probes.standard_probes(VOCABULARY, 64)
    assert all(probe.tokens.shape[1] <= 64 for probe in found)
    assert [(probe.name, *probe.setting.values()) for probe in found[:3]] == [
        ("induction", 16),
        ("associative_recall", 4),
        ("associative_recall", 16),
    ]
    assert sum(probe.name == "needle" for probe in found) == 5


def test_on_a_real_model():
    model = LanguageModel(ModelConfig(mixer="mamba1", vocab_size=200, d_model=16, n_layer=1, d_state=4))
    init.initialize(model, 0)
    found = probes.run_probes(model.eval(), probes.standard_probes(probes.plain_vocabulary(200, [0, 1, 2]), 32))
    assert [result.n_answers for result in found] == [32 * 15, 32 * 4, *[16] * 5]
    assert all(0 <= result.accuracy <= 0.2 and 4 < result.loss < 7 for result in found)


@pytest.mark.slow
def test_a_model_that_learns_to_recall_is_seen():
    vocabulary = torch.arange(8)
    model = LanguageModel(ModelConfig(mixer="mamba2", vocab_size=8, d_model=32, n_layer=2, d_state=16, headdim=16, chunk_size=16))
    init.initialize(model, 0)
    test = probes.associative_recall(vocabulary, 2, n=64, seed=10**6)
    before = probes.run_probe(model, test, batch_size=64)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for step in range(100):
        batch = probes.associative_recall(vocabulary, 2, n=64, seed=2 * step)
        (model(batch.tokens, labels=batch.labels) / (batch.labels != IGNORE).sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    after = probes.run_probe(model, test, batch_size=64)
    assert after.accuracy > 0.8 > 0.5 > before.accuracy
    assert after.loss < before.loss


def test_plain_vocabulary_leaves_special_tokens_out():
    assert probes.plain_vocabulary(6, [0, 4]).tolist() == [1, 2, 3, 5]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: probes.induction(torch.arange(10), 11), "needs 11 different tokens"),
        (lambda: probes.needle(VOCABULARY, 8), "at least 9"),
        (lambda: probes.needle(VOCABULARY, 50, 1.5), "depth from 0 to 1"),
        (lambda: probes.needle(VOCABULARY, 50, haystack=torch.arange(40)), "haystack of 40 tokens is shorter than the 41"),
    ],
)
def test_impossible_probes(make, words):
    with pytest.raises(UserError, match=words):
        make()
