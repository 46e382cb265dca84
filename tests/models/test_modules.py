"""Modules in a model."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from mamba_pretrain.models import mamba2, modules
from mamba_pretrain.models.boundaries import Boundaries
from mamba_pretrain.models.config import ModelConfig
from mamba_pretrain.models.init import initialize
from mamba_pretrain.models.language_model import LanguageModel
from mamba_pretrain.ops import registry

CASES = [
    ("cpu", "reference"),
    ("cpu", "c"),
    pytest.param("cuda", "cuda", marks=pytest.mark.gpu),
    pytest.param("cuda", "mamba_ssm", marks=pytest.mark.gpu),
]


def gradients(device, implementation, compute, **config):
    """The loss and the gradient of every parameter, where ``implementation`` serves the scan of the pattern's only kind of mixer."""
    model = LanguageModel(ModelConfig(vocab_size=50, d_model=32, n_layer=2, d_state=16, headdim=8, n_head=2, d_intermediate=48, **config))
    initialize(model, 1)
    model.to(device)
    tokens = torch.randint(50, (2, 40), generator=torch.Generator().manual_seed(0)).to(device)
    # mamba-ssm's selective scan takes no boundaries.
    seq_idx = (torch.arange(40, device=device) // 15).expand(2, -1)
    boundaries = None if implementation == "mamba_ssm" else Boundaries.from_seq_idx(seq_idx)
    op = {"mamba1": "selective_scan", "mamba2": "ssd_scan"}.get(config["pattern"])
    with registry.using(**({op: implementation} if op else {})), torch.autocast(device, torch.bfloat16, enabled=compute == torch.bfloat16):
        loss = model(tokens, boundaries, tokens)
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(("compute", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize(("device", "implementation"), CASES)
@pytest.mark.parametrize("pattern", ["mamba1", "mamba2", "attention"])
def test_projections_give_a_model_the_gradients_of_linear_layers(pattern, device, implementation, compute, tolerance, monkeypatch):
    """Of every scan: the gradient that it returns for its input is overwritten, which holds only while it is nobody else's."""
    if pattern == "mamba2" and implementation == "cuda":
        pytest.skip("there is no such kernel")
    loss, found = gradients(device, implementation, compute, pattern=pattern)
    monkeypatch.setattr(modules, "project", lambda x, weight, bias, recipe: F.linear(x, weight, bias))
    monkeypatch.setattr(modules, "project_parts", lambda x, weight, bias, widths, recipe: F.linear(x, weight, bias).split(widths, dim=-1))
    monkeypatch.setattr(modules, "project_beside", lambda x, weight, bias: (x, F.linear(x, weight, bias)))
    plain, expected = gradients(device, implementation, compute, pattern=pattern)
    assert torch.equal(loss, plain)
    for name, gradient in expected.items():
        assert found[name].dtype == gradient.dtype == torch.float32
        assert (found[name] - gradient).abs().max() <= tolerance * gradient.abs().max(), name


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("implementation", ["reference", "c"])
def test_the_split_before_mamba2s_scan_changes_no_bit(implementation, compute, monkeypatch):
    """Of any gradient, whether those of its parts are handed on or (the C kernel's in bf16, which are cast) concatenated."""

    def plain(t, *shapes):
        pieces = t.split([rows * columns for rows, columns in shapes], dim=-1)
        return [piece.unflatten(-1, shape) for piece, shape in zip(pieces, shapes, strict=True)]

    loss, found = gradients("cpu", implementation, compute, pattern="mamba2")
    monkeypatch.setattr(mamba2, "split", plain)
    expected_loss, expected = gradients("cpu", implementation, compute, pattern="mamba2")
    assert torch.equal(loss, expected_loss)
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())
