"""The C kernel of the gated norm against fp64."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from mamba_pretrain.ops import cc, registry
from mamba_pretrain.ops.rms_norm import gated_rms_norm

pytestmark = pytest.mark.skipif(cc.compiler() is None, reason="there is no C compiler")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "channels", "group_size"), [(3, 5, None), (7, 16, None), (65, 24, 8), (64, 33, None), (130, 96, 32)])
def test_values_and_gradients(dtype, rows, channels, group_size):
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


def test_threads_do_not_change_a_bit(monkeypatch):
    torch.manual_seed(0)
    x, z, weight = torch.randn(300, 40, requires_grad=True), torch.randn(300, 40), torch.randn(40, requires_grad=True)

    def outcome(threads):
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        with registry.using(gated_rms_norm="c"):
            y = gated_rms_norm(x, z, weight, 1e-5)
        return [y, *torch.autograd.grad(y.square().sum(), [x, weight])]

    for one, three in zip(outcome(1), outcome(3), strict=True):
        assert torch.equal(one, three)
