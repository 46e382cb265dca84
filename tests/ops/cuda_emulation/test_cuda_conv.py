"""The convolution's kernels on a CPU against the fp64 oracle."""

from __future__ import annotations

import pytest
import torch

from mamba_pretrain.ops import cuda_conv, registry
from mamba_pretrain.ops.causal_conv1d import final_inputs, inputs_before
from mamba_pretrain.ops.common import document_numbers


@pytest.fixture
def emulated(emulated_kernels, monkeypatch):
    """Registers the implementation ``emulated``."""

    class Convolution(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight, bias, seq_idx, history, silu):
            ctx.arguments = [x.detach(), weight.detach().t().contiguous(), bias, seq_idx, history]
            ctx.silu = silu
            return cuda_conv.run_forward(*ctx.arguments, silu)

        @staticmethod
        def backward(ctx, dy):
            _, _, bias, _, history = ctx.arguments
            dx, dweight, dbias, dhistory = cuda_conv.run_backward(dy.contiguous(), *ctx.arguments, ctx.silu)
            return dx, dweight.t(), dbias if bias is not None else None, None, dhistory if history is not None else None, None

    def conv(x, weight, bias, activation, seq_idx, initial_state, return_final_state):
        y = Convolution.apply(x, weight, bias, seq_idx, initial_state, activation == "silu")
        if not return_final_state:
            return y
        return y, final_inputs(x, inputs_before(x, weight, initial_state), document_numbers(seq_idx))

    registry.implementations()
    monkeypatch.setitem(registry._implementations, "causal_conv1d", {**registry._implementations["causal_conv1d"]})
    registry.register("causal_conv1d", "emulated", priority=-1)(conv)
    cuda_conv._kernel.cache_clear()
    yield
    cuda_conv._kernel.cache_clear()


def test_cases(conv_case, check_conv, emulated):
    check_conv(conv_case, "emulated", dtype=torch.bfloat16, channels=24)


@pytest.mark.slow
def test_odd_channels(conv_case, check_conv, emulated):
    check_conv(conv_case, "emulated", channels=5, taps=3)


@pytest.mark.parametrize("length", [64, 65, 200])
def test_strips(length, make_case, check_conv, emulated):
    check_conv(make_case(length=length, starts=(1, 63)), "emulated", channels=8)
