"""What the backward pass computes again."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mamba_pretrain.models.config import ModelConfig
from mamba_pretrain.models.init import initialize
from mamba_pretrain.models.language_model import LanguageModel
from mamba_pretrain.ops import registry
from mamba_pretrain.parallel import recompute as recompute_module
from mamba_pretrain.parallel.recompute import recompute

LAYERS = 2


class Count(TorchDispatchMode):
    """Counts forward passes of our operators, and matmuls."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        self.seen[function.name().partition(".")[0]] += 1
        return function(*arguments, **(named or {}))


def backward_of(mode, **config):
    """Operators of the backward pass by name, and the gradients."""
    model = LanguageModel(ModelConfig(vocab_size=50, d_model=16, n_layer=LAYERS, d_state=4, headdim=8, **config))
    initialize(model, 1)
    recompute(model, mode)
    tokens = torch.arange(12)[None]
    loss = model(tokens, labels=tokens)
    with Count() as count:
        loss.backward()
    return count.seen, {name: parameter.grad for name, parameter in model.named_parameters()}


OPERATORS = [
    ("mamba1", "reference", "selective_scan_forward", "causal_conv1d_forward"),
    ("mamba1", "c", "c_scan_forward", "c_conv1d_forward"),
    ("mamba2", "reference", "ssd_scan_forward", "causal_conv1d_forward"),
    ("mamba2", "c", "c_ssd_forward", "c_conv1d_forward"),
]


@pytest.mark.parametrize(("mixer", "implementation", "scan", "conv"), OPERATORS)
def test_scans_are_kept_and_cheap_operators_repeated(mixer, implementation, scan, conv, monkeypatch):
    monkeypatch.setattr(recompute_module, "SHORTEST_INNER", 10)  # between the rank of dt_proj, 1, and d_model, 16
    seen, gradients = {}, {}
    for mode in ("none", "block", "projections", "selective"):
        with registry.using(**dict.fromkeys(("selective_scan", "ssd_scan", "causal_conv1d"), implementation)):
            seen[mode], gradients[mode] = backward_of(mode, mixer=mixer)
    assert [seen[mode][f"mamba_pretrain::{scan}"] for mode in seen] == [0, LAYERS, LAYERS, 0]
    assert [seen[mode][f"mamba_pretrain::{conv}"] for mode in seen] == [0, LAYERS, LAYERS, LAYERS]
    thin = LAYERS if mixer == "mamba1" else 0  # its dt_proj
    for mode in ("projections", "selective"):
        assert seen[mode]["aten::mm"] - thin == seen["none"]["aten::mm"] < seen["block"]["aten::mm"] - thin
    for mode in ("block", "projections", "selective"):
        assert all(torch.equal(gradients[mode][name], gradient) for name, gradient in gradients["none"].items())


def test_attention_is_kept():
    seen = {mode: backward_of(mode, mixer="attention", n_head=2)[0] for mode in ("none", "block", "selective")}
    forward = "aten::_scaled_dot_product_flash_attention_for_cpu"
    assert [seen[mode][forward] for mode in seen] == [0, LAYERS, 0]
