"""The convolution's kernels on a CPU against the fp64 oracle."""

from __future__ import annotations

import pytest
import torch

from mamba_pretrain.ops import cuda_conv_kernels as kernels
from mamba_pretrain.ops import registry
from mamba_pretrain.ops.causal_conv1d import causal_conv1d, final_inputs, inputs_before
from mamba_pretrain.ops.common import document_numbers


@pytest.fixture
def emulated(emulated_kernels, monkeypatch):
    """Registers the implementation ``emulated``; calling the fixture sets how kernels run."""

    class Convolution(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight, bias, seq_idx, history, silu):
            ctx.ops = kernels.Operands(*(None if t is None else t.detach() for t in (x, weight, bias, seq_idx, history)), silu)
            return kernels.forward(ctx.ops)

        @staticmethod
        def backward(ctx, dy):
            dx, dweight, dbias, dhistory = kernels.backward(ctx.ops, dy.contiguous())
            return dx, dweight, dbias if ctx.ops.bias is not None else None, None, dhistory if ctx.ops.history is not None else None, None

    def conv(x, weight, bias, activation, seq_idx, initial_state, return_final_state):
        y = Convolution.apply(x, weight, bias, seq_idx, initial_state, activation == "silu")
        if not return_final_state:
            return y
        return y, final_inputs(x, inputs_before(x, weight, initial_state), document_numbers(seq_idx))

    registry.implementations()
    monkeypatch.setitem(registry._implementations, "causal_conv1d", {**registry._implementations["causal_conv1d"]})
    registry.register("causal_conv1d", "emulated", priority=-1)(conv)

    def set_tuning(channels: int = 4, chunk: int = 32, ahead: int = 4, warps: int = 2) -> None:
        monkeypatch.setattr(kernels, "tuning", lambda name, dtype, device: kernels.Tuning(channels, chunk, ahead, warps, 1))
        kernels._kernel.cache_clear()
        kernels._reduce_kernel.cache_clear()

    yield set_tuning
    kernels._kernel.cache_clear()
    kernels._reduce_kernel.cache_clear()


def test_cases(conv_case, check_conv, emulated):
    emulated()
    check_conv(conv_case, "emulated", dtype=torch.bfloat16, channels=24)


@pytest.mark.parametrize("watched", [True])
def test_barriers_put_every_access_in_order(conv_case, check_conv, emulated):
    emulated()
    check_conv(conv_case, "emulated", dtype=torch.bfloat16, channels=24)


@pytest.mark.slow
def test_cases_in_the_hopper_table(conv_case, check_conv, emulated, monkeypatch):
    emulated()
    monkeypatch.setattr(kernels, "tuning", lambda name, dtype, device: kernels.HOPPER[name])
    check_conv(conv_case, "emulated", dtype=torch.float16, channels=136)


@pytest.mark.slow
def test_odd_channels(conv_case, check_conv, emulated):
    emulated()
    check_conv(conv_case, "emulated", channels=5, taps=3)


@pytest.mark.parametrize(
    ("tuning", "length", "starts"),
    [
        ({}, 64, (1, 63)),
        ({}, 65, (32, 64)),
        ({"chunk": 16, "warps": 3}, 200, (13, 15, 16, 17, 19, 47, 48, 49, 199)),
        ({"channels": 8, "chunk": 32, "ahead": 8, "warps": 1}, 131, "random"),
        ({"channels": 8, "chunk": 8, "ahead": 2, "warps": 4}, 70, "random"),
        ({"channels": 2, "chunk": 32, "ahead": 8, "warps": 2}, 131, "random"),
    ],
    ids=["one-block", "one-step-more", "starts-at-all-edges", "eight-ahead", "two-ahead", "two-channels"],
)
def test_chunks(tuning, length, starts, make_case, check_conv, emulated):
    emulated(**tuning)
    check_conv(make_case(length=length, starts=starts), "emulated", dtype=torch.bfloat16, channels=272 if "channels" in tuning else 8)


@pytest.mark.parametrize("taps", [1, 2, pytest.param(3, marks=pytest.mark.slow), pytest.param(5, marks=pytest.mark.slow), 8])
def test_taps(taps, make_case, check_conv, emulated):
    emulated()
    check_conv(make_case(length=75), "emulated", channels=8, taps=taps)


def test_documents_are_isolated_to_the_bit(check_isolation, emulated):
    emulated()
    torch.manual_seed(0)
    weight, bias = torch.randn(16, 4), torch.randn(16)

    def op(x, seq_idx):
        with registry.using(causal_conv1d="emulated"):
            return causal_conv1d(x, weight, bias, seq_idx=seq_idx)

    for start in (30, 33):
        check_isolation(op, {"x": torch.randn(1, 70, 16)}, {}, start)


def test_strided_rows_and_unaligned_parameters_give_the_same(emulated):
    emulated()
    torch.manual_seed(0)
    x, dy, weight = torch.randn(2, 40, 16), torch.randn(2, 40, 16), torch.randn(16, 4)
    wide, shifted = torch.randn(2, 40, 40), torch.randn(65)
    wide[..., 8:24] = x
    shifted[1:] = weight.flatten()
    results = [
        kernels.backward(kernels.Operands(a, b, None, None, None, True), dy)[:3]
        for a, b in ((x, weight), (wide[..., 8:24], weight), (x, shifted[1:].view(16, 4)))
    ]
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


def test_the_inputs_gradient_may_be_a_part_of_a_wider_tensor(emulated):
    emulated()
    torch.manual_seed(0)
    ops = kernels.Operands(torch.randn(2, 70, 16), torch.randn(16, 4), None, None, None, True)
    dy, wide = torch.randn(2, 70, 16), torch.full((2, 70, 40), 7.0)
    expected = kernels.backward(ops, dy)
    found = kernels.backward(ops, dy, wide[..., 8:24])
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(wide[..., 8:24], expected[0])
    assert (wide[..., :8] == 7).all()
    assert (wide[..., 24:] == 7).all()
