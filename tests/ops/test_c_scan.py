"""The C kernel of the selective scan against the fp64 oracle."""

from __future__ import annotations

import pytest
import torch

from mamba_pretrain.ops import cc, registry
from mamba_pretrain.ops.selective_scan import selective_scan

pytestmark = pytest.mark.skipif(cc.compiler() is None, reason="there is no C compiler")


def test_cases(selective_scan_case, check_selective_scan):
    check_selective_scan(selective_scan_case, "c")


@pytest.mark.parametrize(("channels", "state"), [(1, 1), (16, 16), (17, 16), (130, 8), (300, 16)])
def test_shapes(channels, state, short_selective_scan_case, check_selective_scan):
    check_selective_scan(short_selective_scan_case, "c", batch=3, channels=channels, state=state)


def test_bf16(short_selective_scan_case, check_selective_scan):
    check_selective_scan(short_selective_scan_case, "c", dtype=torch.bfloat16)


def tensors(batch: int, length: int, channels: int, states: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    wide = torch.randn(batch, length, 2 * channels)
    both = torch.randn(batch, length, 2 * states)
    return {
        "u": wide[..., :channels],  # halves of a projection, as a model gives them
        "z": wide[..., channels:],
        "delta": torch.randn(batch, length, channels),
        "A": -4 * torch.rand(channels, states),
        "B": both[..., :states],
        "C": both[..., states:],
        "D": torch.randn(channels),
        "delta_bias": torch.randn(channels),
    }


def test_threads_do_not_change_a_bit(check_threads):
    check_threads(selective_scan, tensors(2, 70, 300, 16))


@pytest.mark.parametrize("start", [1, 31, 32, 33, 99])
def test_documents_are_isolated_to_the_bit(start, check_isolation):
    inputs = tensors(2, 100, 20, 4)
    shared = {name: inputs.pop(name) for name in ("A", "D", "delta_bias")}
    with registry.using(selective_scan="c"):
        check_isolation(selective_scan, inputs, shared, start)


def test_doubles_go_to_the_reference():
    inputs = {name: t.double() for name, t in tensors(1, 5, 3, 2).items()}
    assert registry.resolve("selective_scan", registry.Request(inputs)).name == "reference"
