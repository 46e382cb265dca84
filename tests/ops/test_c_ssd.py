"""The C kernel of Mamba-2's scan against the fp64 oracle."""

from __future__ import annotations

import pytest
import torch

from mamba_pretrain.ops import cc, registry
from mamba_pretrain.ops.ssd_scan import ssd_scan

pytestmark = pytest.mark.skipif(cc.compiler() is None, reason="there is no C compiler")


def test_cases(ssd_scan_case, check_ssd_scan):
    check_ssd_scan(ssd_scan_case, "c")


@pytest.mark.parametrize(
    ("heads", "headdim", "groups", "state"), [(1, 1, 1, 1), (6, 16, 1, 16), (10, 17, 2, 7), (8, 40, 8, 32), (2, 64, 1, 9), (2, 130, 1, 3)]
)
def test_shapes(heads, headdim, groups, state, short_ssd_scan_case, check_ssd_scan):
    check_ssd_scan(short_ssd_scan_case, "c", heads=heads, headdim=headdim, groups=groups, state=state)


def test_bf16(short_ssd_scan_case, check_ssd_scan):
    check_ssd_scan(short_ssd_scan_case, "c", dtype=torch.bfloat16)


def tensors(batch: int, length: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    heads, headdim, groups, states = 6, 20, 2, 9
    both = torch.randn(batch, length, 2, groups, states)
    return {
        "x": torch.randn(batch, length, heads, headdim),
        "z": torch.randn(batch, length, heads, headdim),
        "dt": torch.randn(batch, length, heads),
        "A": -4 * torch.rand(heads),
        "B": both[:, :, 0],
        "C": both[:, :, 1],
        "D": torch.randn(heads),
        "dt_bias": torch.randn(heads),
    }


def test_threads_do_not_change_a_bit(check_threads):
    check_threads(ssd_scan, tensors(2, 70))


@pytest.mark.parametrize("start", [1, 15, 16, 33, 64, 99])
def test_documents_are_isolated_to_the_bit(start, check_isolation):
    inputs = tensors(2, 100)
    shared = {name: inputs.pop(name) for name in ("A", "D", "dt_bias")}
    with registry.using(ssd_scan="c"):
        check_isolation(ssd_scan, inputs, shared, start)
