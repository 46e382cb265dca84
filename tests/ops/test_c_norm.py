"""The C kernel of the norms against fp64."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from mamba_pretrain.ops import cc, registry
from mamba_pretrain.ops.rms_norm import gated_rms_norm, rms_norm

pytestmark = pytest.mark.skipif(cc.compiler() is None, reason="there is no C compiler")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "channels", "group_size"), [(3, 5, None), (7, 16, None), (65, 24, 8), (64, 33, None), (130, 96, 32)])
def test_gated_norm(dtype, rows, channels, group_size):
    torch.manual_seed(0)
    both = torch.randn(rows, 2 * channels).to(dtype).requires_grad_()
    weight = torch.randn(channels, requires_grad=True)
    upstream = torch.randn(rows, channels)
    with registry.using(gated_rms_norm="c"):
        y = gated_rms_norm(*both.chunk(2, dim=-1), weight, 1e-5, group_size)
    found = [y, *torch.autograd.grad((y.float() * upstream).sum(), [both, weight])]

    exact = both.detach().double().requires_grad_()
    exact_weight = weight.detach().double().requires_grad_()
    x, z = exact.chunk(2, dim=-1)
    groups = (x * F.silu(z)).unflatten(-1, (-1, group_size or channels))
    normalised = groups / (groups.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    y = normalised.flatten(-2) * exact_weight
    expected = [y, *torch.autograd.grad((y * upstream).sum(), [exact, exact_weight])]
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for a, b in zip(found, expected, strict=True):
        assert (a.double() - b).abs().max() <= tolerance * b.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("use", ["both", "y", "total"])
@pytest.mark.parametrize(("rows", "channels"), [(1, 5), (65, 33), (130, 96)])
def test_norm(dtype, with_residual, use, rows, channels):
    torch.manual_seed(0)
    x = torch.randn(2, rows, channels).to(dtype).requires_grad_()
    residual = torch.randn(2, rows, channels, requires_grad=True)
    weight = torch.randn(channels, requires_grad=True)
    upstream, upstream_total = torch.randn(2, 2, rows, channels)
    leaves = [x, weight, *([residual] if with_residual else [])]

    def gradients(y, total, leaves):
        terms = [(y * upstream).sum()] if use != "total" or not with_residual else []
        terms += [(total * upstream_total).sum()] if with_residual and use != "y" else []
        return torch.autograd.grad(sum(terms), leaves, allow_unused=True)

    with registry.using(rms_norm="c"):
        found = rms_norm(x, weight, 1e-5, residual=residual if with_residual else None)
    y, total = found if with_residual else (found, None)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    exact_total = exact[0] + (exact[2] if with_residual else 0.0)
    exact_y = exact_total / (exact_total.square().mean(-1, keepdim=True) + 1e-5).sqrt() * exact[1]
    assert y.dtype == dtype
    pairs = [(y, exact_y), *zip(gradients(y.float(), total, leaves), gradients(exact_y, exact_total, exact), strict=True)]
    if with_residual:
        pairs.append((total, exact_total))
        assert total.dtype == torch.float32
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for a, b in pairs:
        b = torch.zeros(()) if b is None else b
        assert (a.double() - b).abs().max() <= tolerance * max(b.abs().max(), 1e-30)


def test_threads_do_not_change_a_bit(check_threads):
    torch.manual_seed(0)
    x, z, weight = torch.randn(300, 40), torch.randn(300, 40), torch.randn(40)
    check_threads(gated_rms_norm, {"x": x, "z": z, "weight": weight}, eps=1e-5)
    check_threads(rms_norm, {"x": x, "weight": weight}, eps=1e-5)
