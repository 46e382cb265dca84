"""FLOPs that PyTorch's counter reports."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mamba_pretrain.ops import flops, registry
from mamba_pretrain.ops.causal_conv1d import causal_conv1d
from mamba_pretrain.ops.cross_entropy import linear_cross_entropy
from mamba_pretrain.ops.selective_scan import selective_scan
from mamba_pretrain.ops.ssd_scan import ssd_scan


def count(function, *tensors: torch.Tensor) -> tuple[int, int]:
    """FLOPs of forward, and of forward and backward."""
    tensors = [t.requires_grad_() for t in tensors]
    with FlopCounterMode(display=False) as forward:
        y = function(*tensors)
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    return forward.get_total_flops(), forward.get_total_flops() + backward.get_total_flops()


@pytest.mark.parametrize("implementation", ["reference", "c"])
def test_counts(implementation):
    b, l, d, n, h, p, g = 2, 30, 8, 4, 3, 5, 1
    R = torch.randn
    with registry.using(**dict.fromkeys(("selective_scan", "ssd_scan", "causal_conv1d"), implementation)):
        expected = flops.selective_scan_flops(b * l, d, n)
        assert count(selective_scan, R(b, l, d), R(b, l, d), -torch.rand(d, n), R(b, l, n), R(b, l, n)) == (expected, 3 * expected)
        assert expected == 9 * b * l * d * n

        expected = flops.ssd_scan_flops(b * l, l, 256, h, p, g, n)
        assert count(ssd_scan, R(b, l, h, p), R(b, l, h), -torch.rand(h), R(b, l, g, n), R(b, l, g, n)) == (expected, 3 * expected)
        # By hand: C.B and the masked matrix times x inside a chunk of 30, states written and read, one state passed on per chunk.
        assert expected == 2 * b * l * (g * 30 * n + h * 30 * p + 2 * h * p * n) + 2 * b * l * h * p * n // 30

        expected = 2 * b * l * d * 4
        assert count(causal_conv1d, R(b, l, d), R(d, 4), R(d)) == (expected, 3 * expected)

    labels = torch.randint(0, 20, (b, l))
    assert count(lambda *t: linear_cross_entropy(*t, labels), R(b, l, d), R(20, d))[1] == 3 * 2 * b * l * d * 20
