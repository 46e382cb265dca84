"""The convolution's own kernels against the fp64 oracle, on a GPU."""

from __future__ import annotations

import pytest
import torch

from mamba_pretrain.ops import registry
from mamba_pretrain.ops.causal_conv1d import causal_conv1d

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("channels", "taps"), [(64, 4), (37, 3), (520, 2)])
def test_cases(conv_case, check_conv, dtype, channels, taps):
    check_conv(conv_case, "cuda", device="cuda", dtype=dtype, channels=channels, taps=taps)


def test_two_runs_are_equal_to_the_bit_and_strides_do_not_matter():
    torch.manual_seed(0)
    x = torch.randn(3, 700, 512, device="cuda", dtype=torch.bfloat16)[..., :256]
    weight, bias = torch.randn(256, 4, device="cuda"), torch.randn(256, device="cuda")
    dy = torch.randn(3, 700, 256, device="cuda", dtype=torch.bfloat16)
    seq_idx = (torch.rand(3, 700, device="cuda") < 0.02).int().cumsum(1).int()

    def run(x):
        inputs = [t.detach().requires_grad_() for t in (x, weight, bias)]
        with registry.using(causal_conv1d="cuda"):
            y = causal_conv1d(*inputs, seq_idx=seq_idx)
        return [y, *torch.autograd.grad(y, inputs, dy)]

    first = run(x)
    for other in (run(x), run(x.contiguous())):
        for a, b in zip(first, other, strict=True):
            assert torch.equal(a, b)
