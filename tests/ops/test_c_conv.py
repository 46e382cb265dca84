"""The C kernel of the causal convolution against taps counted one by one in fp64."""

from __future__ import annotations

import pytest
import torch

from mamba_pretrain.ops import cc, registry
from mamba_pretrain.ops.causal_conv1d import causal_conv1d

pytestmark = pytest.mark.skipif(cc.compiler() is None, reason="there is no C compiler")


@pytest.mark.parametrize("taps", [1, 2, 3, 4, 8])
def test_cases(conv_case, check_conv, taps):
    check_conv(conv_case, "c", taps=taps)


@pytest.mark.parametrize("channels", [1, 16, 17, 300])
def test_shapes(conv_case, check_conv, channels):
    check_conv(conv_case, "c", batch=3, channels=channels)


def test_bf16(conv_case, check_conv):
    check_conv(conv_case, "c", dtype=torch.bfloat16)


def test_threads_do_not_change_a_bit(check_threads):
    torch.manual_seed(0)
    check_threads(causal_conv1d, {"x": torch.randn(2, 70, 300), "weight": torch.randn(300, 4), "bias": torch.randn(300)})


@pytest.mark.parametrize("start", [1, 2, 3, 4, 16, 19])
def test_documents_are_isolated_to_the_bit(start, check_isolation):
    torch.manual_seed(0)
    shared = {"weight": torch.randn(6, 4), "bias": torch.randn(6)}
    with registry.using(causal_conv1d="c"):
        check_isolation(causal_conv1d, {"x": torch.randn(2, 20, 6)}, shared, start)


def test_reads_a_slice_of_a_projection_in_place():
    torch.manual_seed(0)
    wide, weight = torch.randn(2, 30, 50), torch.randn(20, 4)
    with registry.using(causal_conv1d="c"):
        assert torch.equal(causal_conv1d(wide[..., 7:27], weight), causal_conv1d(wide[..., 7:27].contiguous(), weight))
