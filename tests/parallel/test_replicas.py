"""Buckets of gradients: when each is summed, and what is refused. The sums themselves are tested with every engine."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mamba_pretrain.parallel import replicas
from mamba_pretrain.parallel.replicas import Replicas


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(4, 4, bias=False) for _ in range(3))

    def forward(self, x):
        return self.third(self.second(self.first(x))).sum()


@pytest.fixture
def summed(monkeypatch):
    """The gradients handed to the collective, in order."""
    seen = []

    class Work:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            return False

        def wait(self):
            seen.append("waited")

    monkeypatch.setattr(replicas, "_coalescing_manager", lambda async_ops: Work())
    monkeypatch.setattr(replicas.dist, "all_reduce", seen.append)
    return seen


def test_buckets_are_summed_from_the_last_layer_on_while_the_pass_goes_on(summed):
    model = Model()
    exchange = Replicas(list(model.parameters()), torch.device("cpu"), bucket_bytes=64)
    at_first = []
    model.first.weight.register_hook(lambda _: at_first.append(len(summed)))
    exchange.expect(last=True)
    model(torch.ones(2, 4)).backward()
    exchange.finish()
    assert at_first == [2], "two layers were on their way when the first layer's gradient came to be"
    assert all(a is b.grad for a, b in zip(summed[:3], (model.third.weight, model.second.weight, model.first.weight), strict=True))
    assert summed[3:] == ["waited"] * 3


def test_only_the_last_micro_batch_is_summed(summed):
    model = Model()
    exchange = Replicas(list(model.parameters()), torch.device("cpu"))
    exchange.expect(last=False)
    model(torch.ones(2, 4)).backward()
    exchange.finish()
    assert summed == []
    exchange.expect(last=True)
    model(torch.ones(2, 4)).backward()
    exchange.finish()
    assert len(summed) == 4  # one bucket: three gradients and its wait


def test_a_parameter_without_a_gradient_is_an_error(summed):
    model = Model()
    exchange = Replicas([*model.parameters(), nn.Parameter(torch.zeros(3))], torch.device("cpu"))
    exchange.expect(last=True)
    model(torch.ones(2, 4)).backward()
    with pytest.raises(RuntimeError, match="1 parameters got no gradient"):
        exchange.finish()
