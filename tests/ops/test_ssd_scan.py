"""Mamba-2's scan against a sequential fp64 oracle."""

from __future__ import annotations

import pytest
import torch

from data_tools.errors import UserError
from mamba_pretrain.ops import registry, ssd_scan_reference
from mamba_pretrain.ops.ssd_scan import ssd_scan


def test_reference_cases(ssd_scan_case, check_ssd_scan):
    check_ssd_scan(ssd_scan_case, "reference")


def test_reference_in_bf16(short_ssd_scan_case, check_ssd_scan):
    check_ssd_scan(short_ssd_scan_case, "reference", dtype=torch.bfloat16)


@pytest.mark.gpu
def test_reference_on_gpu(ssd_scan_case, check_ssd_scan):
    check_ssd_scan(ssd_scan_case, "reference", device="cuda")


@pytest.mark.parametrize("groups", [1, 4])
def test_groups(short_ssd_scan_case, check_ssd_scan, groups):
    check_ssd_scan(short_ssd_scan_case, "reference", groups=groups, batch=3, gated=False)


def test_blocks_do_not_change_the_result(short_ssd_scan_case, check_ssd_scan, monkeypatch):
    monkeypatch.setitem(ssd_scan_reference.MAX_CHUNK, "cpu", 8)
    monkeypatch.setitem(ssd_scan_reference.BLOCK_ELEMENTS, "cpu", 1500)
    check_ssd_scan(short_ssd_scan_case, "reference")


@pytest.mark.parametrize("start", [1, 7, 16, 32, 33, 64, 99])
def test_documents_are_isolated_to_the_bit(start, check_isolation):
    torch.manual_seed(0)
    b, l, h, p, g, n = 2, 100, 4, 3, 2, 5
    sequences = {
        "x": torch.randn(b, l, h, p),
        "dt": torch.randn(b, l, h),
        "B": torch.randn(b, l, g, n),
        "C": torch.randn(b, l, g, n),
        "z": torch.randn(b, l, h, p),
    }
    shared = {"A": -4 * torch.rand(h), "D": torch.randn(h), "dt_bias": torch.randn(h)}
    with registry.using(ssd_scan="reference"):
        check_isolation(ssd_scan, sequences, shared, start)


def test_continuing_from_a_state_equals_one_run():
    torch.manual_seed(0)
    b, l, h, p, n = 2, 150, 2, 4, 3
    x, dt, A = torch.randn(b, l, h, p), torch.randn(b, l, h), -torch.rand(h)
    B, C = torch.randn(2, b, l, 1, n)
    whole, final = ssd_scan(x, dt, A, B, C, return_final_state=True)
    state, pieces = None, []
    for part in (slice(0, 65), slice(65, 66), slice(66, 150)):
        y, state = ssd_scan(x[:, part], dt[:, part], A, B[:, part], C[:, part], initial_state=state, return_final_state=True)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), whole)
    torch.testing.assert_close(state, final)


def test_autocast_keeps_matmuls_in_fp32():
    torch.manual_seed(0)
    arguments = [torch.randn(1, 40, 2, 8), torch.randn(1, 40, 2), -torch.rand(2), torch.randn(1, 40, 1, 4), torch.randn(1, 40, 1, 4)]
    expected = ssd_scan(*arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ssd_scan(*arguments), expected)


def test_heads_must_divide_into_groups():
    x, shared = torch.randn(1, 4, 3, 2), torch.randn(1, 4, 2, 5)
    with pytest.raises(UserError, match="3 heads and 2 groups"):
        ssd_scan(x, torch.randn(1, 4, 3), -torch.rand(3), shared, shared)


def test_compiles_without_a_graph_break():
    torch.manual_seed(0)
    arguments = [torch.randn(1, 20, 2, 8), torch.randn(1, 20, 2), -torch.rand(2), torch.randn(1, 20, 1, 4), torch.randn(1, 20, 1, 4)]

    def loss(*t):
        return ssd_scan(*t).square().sum()

    for t in arguments:
        t.requires_grad_()
    expected = torch.autograd.grad(loss(*arguments), arguments)
    found = torch.autograd.grad(torch.compile(loss, backend="aot_eager", fullgraph=True)(*arguments), arguments)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
