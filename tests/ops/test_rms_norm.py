"""Norms against the formula in fp64."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from mamba_pretrain.ops import common, registry
from mamba_pretrain.ops.rms_norm import gated_rms_norm, rms_norm


def exact_norm(s: torch.Tensor, eps: float) -> torch.Tensor:
    return s / torch.sqrt(s.square().mean(-1, keepdim=True) + eps)


def compare(found, expected, inputs, exact_inputs, tolerance):
    """Outputs and gradients, for random upstream gradients."""
    upstream = [torch.randn(t.shape) for t in found]
    gradients = torch.autograd.grad(list(found), inputs, [g.to(t.dtype) for g, t in zip(upstream, found, strict=True)])
    exact = torch.autograd.grad(list(expected), exact_inputs, [g.to(t.dtype).double() for g, t in zip(upstream, found, strict=True)])
    for a, b in zip([*found, *gradients], [*expected, *exact], strict=True):
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance * b.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("channels", [2, 5, 64, 200])
def test_rms_norm(dtype, with_residual, channels):
    torch.manual_seed(0)
    inputs = [torch.randn(3, 7, channels).to(dtype).requires_grad_(), torch.randn(channels, requires_grad=True)]
    inputs += [torch.randn(3, 7, channels, requires_grad=True)] if with_residual else []
    exact_inputs = [t.detach().double().requires_grad_() for t in inputs]
    x, weight, *residual = exact_inputs
    total = x + residual[0] if with_residual else x
    expected = [exact_norm(total, 1e-5) * weight, *([total] if with_residual else [])]
    with registry.using(rms_norm="reference"):
        found = rms_norm(inputs[0], inputs[1], 1e-5, residual=inputs[2] if with_residual else None)
    found = list(found) if with_residual else [found]
    assert found[0].dtype == dtype
    assert not with_residual or found[1].dtype == torch.float32
    compare(found, expected, inputs, exact_inputs, 1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group_size", [None, 1, 6])
@pytest.mark.parametrize("block", [1 << 17, 30])
def test_gated_rms_norm(dtype, group_size, block, monkeypatch):
    monkeypatch.setitem(common.ROW_BLOCK_ELEMENTS, "cpu", block)
    torch.manual_seed(0)
    inputs = [
        torch.randn(3, 7, 24).to(dtype).requires_grad_(),
        torch.randn(3, 7, 24).to(dtype).requires_grad_(),
        torch.randn(24, requires_grad=True),
    ]
    exact_inputs = [t.detach().double().requires_grad_() for t in inputs]
    x, z, weight = exact_inputs
    groups = (x * F.silu(z)).unflatten(-1, (-1, group_size or 24))
    with registry.using(gated_rms_norm="reference"):
        found = gated_rms_norm(*inputs, 1e-5, group_size)
    assert found.dtype == dtype
    compare([found], [exact_norm(groups, 1e-5).flatten(-2) * weight], inputs, exact_inputs, 1e-5 if dtype == torch.float32 else 1e-2)


def test_a_strided_gate_is_read_right():
    torch.manual_seed(0)
    both, weight = torch.randn(2, 5, 40), torch.randn(20)
    x, z = both.chunk(2, dim=-1)
    torch.testing.assert_close(gated_rms_norm(x, z, weight, 1e-5), gated_rms_norm(x.contiguous(), z.contiguous(), weight, 1e-5))


def test_autocast_decides_the_output_dtype_and_the_weight_stays_fp32():
    torch.manual_seed(0)
    x, weight = torch.randn(4, 32), 1 + torch.full((32,), 2**-12)  # vanishes in bf16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, residual = rms_norm(x, weight, 1e-5, residual=x)
        gated = gated_rms_norm(x, x, weight, 1e-5)
    assert y.dtype == gated.dtype == torch.bfloat16
    assert residual.dtype == torch.float32
    assert torch.equal(residual, x + x)
    assert torch.equal(y, (exact_norm(2 * x, 1e-5) * weight).bfloat16())
