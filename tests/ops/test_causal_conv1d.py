"""The causal convolution against taps counted one by one in fp64."""

from __future__ import annotations

import pytest
import torch

from data_tools.errors import UserError
from mamba_pretrain.ops import common, registry
from mamba_pretrain.ops.causal_conv1d import causal_conv1d


@pytest.mark.parametrize("taps", [2, 3, 4, 7])
def test_reference_cases(conv_case, check_conv, taps):
    check_conv(conv_case, "reference", taps=taps)


def test_reference_in_bf16(conv_case, check_conv):
    check_conv(conv_case, "reference", dtype=torch.bfloat16)


@pytest.mark.parametrize("elements", [1, 40])
def test_blocks_do_not_change_the_result(conv_case, check_conv, elements, monkeypatch):
    monkeypatch.setitem(common.ROW_BLOCK_ELEMENTS, "cpu", elements)
    check_conv(conv_case, "reference")


@pytest.mark.parametrize("start", [1, 2, 3, 4, 16, 19])
def test_documents_are_isolated_to_the_bit(start, check_isolation):
    torch.manual_seed(0)
    shared = {"weight": torch.randn(6, 4), "bias": torch.randn(6)}
    with registry.using(causal_conv1d="reference"):
        check_isolation(causal_conv1d, {"x": torch.randn(2, 20, 6)}, shared, start)


def test_continuing_from_a_state_equals_one_run():
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 11, 6), torch.randn(6, 4), torch.randn(6)
    whole, final = causal_conv1d(x, weight, bias, return_final_state=True)
    state, pieces = None, []
    for part in (slice(0, 1), slice(1, 3), slice(3, 10), slice(10, 11)):
        y, state = causal_conv1d(x[:, part], weight, bias, initial_state=state, return_final_state=True)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), whole)
    assert torch.equal(state, final)


def test_an_unknown_activation_is_refused():
    with pytest.raises(UserError, match="no activation 'relu'"):
        causal_conv1d(torch.randn(1, 3, 2), torch.randn(2, 4), activation="relu")


def test_compiles_without_a_graph_break():
    torch.manual_seed(0)
    arguments = [torch.randn(2, 9, 6, requires_grad=True), torch.randn(6, 4, requires_grad=True), torch.randn(6, requires_grad=True)]

    def loss(*t):
        return causal_conv1d(*t).square().sum()

    expected = torch.autograd.grad(loss(*arguments), arguments)
    found = torch.autograd.grad(torch.compile(loss, backend="aot_eager", fullgraph=True)(*arguments), arguments)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
