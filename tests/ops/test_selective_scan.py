"""The selective scan against a sequential fp64 oracle."""

from __future__ import annotations

import pytest
import torch

from mamba_pretrain.ops import registry, selective_scan_reference
from mamba_pretrain.ops.selective_scan import selective_scan


def test_reference_cases(selective_scan_case, check_selective_scan):
    check_selective_scan(selective_scan_case, "reference")


def test_reference_in_bf16(short_selective_scan_case, check_selective_scan):
    check_selective_scan(short_selective_scan_case, "reference", dtype=torch.bfloat16)


@pytest.mark.gpu
def test_reference_on_gpu(selective_scan_case, check_selective_scan):
    check_selective_scan(selective_scan_case, "reference", device="cuda")


@pytest.mark.parametrize("block_elements", [1, 1500])
def test_blocks_and_segments_do_not_change_the_result(short_selective_scan_case, check_selective_scan, block_elements, monkeypatch):
    monkeypatch.setattr(selective_scan_reference, "SEGMENT", 16)
    monkeypatch.setattr(selective_scan_reference, "MIN_CHANNELS", 1)
    monkeypatch.setitem(selective_scan_reference.BLOCK_ELEMENTS, "cpu", block_elements)
    check_selective_scan(short_selective_scan_case, "reference")


@pytest.mark.parametrize("start", [1, 7, 16, 32, 33, 99])
def test_documents_are_isolated_to_the_bit(start, check_isolation):
    torch.manual_seed(0)
    b, l, d, n = 2, 100, 6, 4
    sequences = {
        "u": torch.randn(b, l, d),
        "delta": torch.randn(b, l, d),
        "B": torch.randn(b, l, n),
        "C": torch.randn(b, l, n),
        "z": torch.randn(b, l, d),
    }
    shared = {"A": -4 * torch.rand(d, n), "D": torch.randn(d), "delta_bias": torch.randn(d)}
    with registry.using(selective_scan="reference"):
        check_isolation(selective_scan, sequences, shared, start)


def test_odd_shapes(check_selective_scan, short_selective_scan_case):
    """Several rows, more channels than states and an odd state size."""
    check_selective_scan(short_selective_scan_case, "reference", batch=3, channels=9, state=1)


def test_continuing_from_a_state_equals_one_run():
    torch.manual_seed(0)
    b, l, d, n = 2, 70, 5, 3
    u, delta, z = torch.randn(3, b, l, d)
    B, C = torch.randn(2, b, l, n)
    A = -torch.rand(d, n)
    whole, final = selective_scan(u, delta, A, B, C, z=z, return_final_state=True)
    state, pieces = None, []
    for part in (slice(0, 33), slice(33, 34), slice(34, 70)):
        y, state = selective_scan(
            u[:, part], delta[:, part], A, B[:, part], C[:, part], z=z[:, part], initial_state=state, return_final_state=True
        )
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), whole)
    torch.testing.assert_close(state, final)


def test_autocast_keeps_the_state_in_fp32():
    torch.manual_seed(0)
    arguments = [torch.randn(1, 40, 8), torch.randn(1, 40, 8), -torch.rand(8, 4), torch.randn(1, 40, 4), torch.randn(1, 40, 4)]
    expected = selective_scan(*arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(selective_scan(*arguments), expected)


def test_compiles_without_a_graph_break():
    torch.manual_seed(0)
    arguments = [torch.randn(1, 20, 8), torch.randn(1, 20, 8), -torch.rand(8, 4), torch.randn(1, 20, 4), torch.randn(1, 20, 4)]
    seq_idx = torch.arange(20, dtype=torch.int32)[None] // 7

    def loss(*t):
        return selective_scan(*t, seq_idx=seq_idx).square().sum()

    for t in arguments:
        t.requires_grad_()
    expected = torch.autograd.grad(loss(*arguments), arguments)
    found = torch.autograd.grad(torch.compile(loss, backend="aot_eager", fullgraph=True)(*arguments), arguments)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
