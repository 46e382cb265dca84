"""One token at a time against the operations over whole sequences."""

from __future__ import annotations

import pytest
import torch

from mamba_pretrain.ops import registry
from mamba_pretrain.ops.causal_conv1d import causal_conv1d
from mamba_pretrain.ops.conv_step import conv_step
from mamba_pretrain.ops.selective_scan import selective_scan
from mamba_pretrain.ops.selective_step import selective_step
from mamba_pretrain.ops.ssd_scan import ssd_scan
from mamba_pretrain.ops.ssd_step import ssd_step

BATCH, LENGTH = 2, 12


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("taps", [2, 4, 6])
@pytest.mark.parametrize("bias", [True, False])
def test_the_convolution(taps, bias):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(BATCH, LENGTH, 7), torch.randn(7, taps), torch.randn(7) if bias else None
    state = torch.zeros(BATCH, taps - 1, 7)
    expected, final = causal_conv1d(x, weight, bias, return_final_state=True)
    close(torch.stack([conv_step(x[:, t], weight, bias, state) for t in range(LENGTH)], 1), expected)
    close(state, final)


def test_the_selective_scan():
    torch.manual_seed(0)
    d, n, r = 6, 5, 3
    u, z, dt = (torch.randn(BATCH, LENGTH, width) for width in (d, d, r))
    B, C = (torch.randn(BATCH, LENGTH, n) for _ in range(2))
    weight, A_log, D, bias = torch.randn(d, r), torch.randn(d, n), torch.randn(d), torch.randn(d)
    state = torch.zeros(BATCH, d, n)
    steps = [selective_step(u[:, t], dt[:, t], weight, A_log, B[:, t], C[:, t], D, z[:, t], bias, state) for t in range(LENGTH)]
    expected, final = selective_scan(u, dt @ weight.t(), -A_log.exp(), B, C, D, z, bias, return_final_state=True)
    close(torch.stack(steps, 1), expected)
    close(state, final)


@pytest.mark.parametrize("limit", [(0.0, float("inf")), (0.05, 0.5)])
@pytest.mark.parametrize("groups", [1, 2])
def test_the_ssd_scan(groups, limit):
    torch.manual_seed(0)
    h, p, n = 4, 3, 5
    x, dt = torch.randn(BATCH, LENGTH, h, p), torch.randn(BATCH, LENGTH, h)
    B, C = (torch.randn(BATCH, LENGTH, groups, n) for _ in range(2))
    A_log, D, bias = torch.randn(h), torch.randn(h), torch.randn(h)
    state = torch.zeros(BATCH, h, p, n)
    steps = [ssd_step(x[:, t], dt[:, t], A_log, B[:, t], C[:, t], D, bias, state, limit) for t in range(LENGTH)]
    expected, final = ssd_scan(x, dt, -A_log.exp(), B, C, D, dt_bias=bias, return_final_state=True, dt_limit=limit)
    close(torch.stack(steps, 1), expected)
    close(state, final)


def test_a_kernel_without_gradients_says_so():
    x, weight, state = torch.randn(2, 8), torch.randn(8, 4, requires_grad=True), torch.zeros(2, 3, 8)
    request = registry.Request({"x": x, "weight": weight, "bias": None, "state": state})
    triton = next(i for i in registry.implementations("conv_step") if i.name == "triton")
    assert triton.unsupported(request) == "it needs a CUDA device, not cpu"
    conv_step(x, weight, None, state).sum().backward()
    assert weight.grad is not None
