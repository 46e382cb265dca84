"""Kept bf16 copies of weights never lag behind the weights."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import nn

from mamba_pretrain.ops import weight_copy
from mamba_pretrain.ops.cross_entropy import linear_cross_entropy
from mamba_pretrain.ops.projection import project


def parameter(*shape: int) -> nn.Parameter:
    found = nn.Parameter(torch.randn(shape))
    weight_copy.keep(found)
    return found


def test_a_weight_is_cast_once():
    weight = parameter(3, 5)
    first = weight_copy.cast(weight, torch.bfloat16)
    assert torch.equal(first, weight.bfloat16())
    assert not first.requires_grad
    assert weight_copy.cast(weight, torch.bfloat16) is first


@pytest.mark.parametrize(
    "change",
    {
        "in place": lambda w: w.mul_(2),
        "by an optimizer": lambda w: torch.optim.SGD([w], lr=1.0).step(),
        "by a load": lambda w: w.copy_(torch.randn(3, 5)),
        "of a part": lambda w: w[1:].zero_(),
        "through a view": lambda w: w.view(-1)[2:].add_(1),
    }.items(),
    ids=lambda pair: pair[0],
)
@pytest.mark.parametrize("asked", [weight_copy.cast, lambda weight, _: weight_copy.refresh([weight]) or weight_copy.valid(weight)])
def test_every_change_is_followed(change, asked):
    weight = parameter(3, 5)
    before = weight_copy.cast(weight, torch.bfloat16).clone()
    weight.grad = torch.ones(3, 5)
    with torch.no_grad():
        change[1](weight)
    assert weight_copy.valid(weight) is None
    found = asked(weight, torch.bfloat16)
    assert torch.equal(found, weight.bfloat16())
    assert not torch.equal(found, before)


def test_what_is_written_by_address_stays_valid_and_is_known_to_have_changed():
    weight, stale, plain = parameter(2), parameter(2), nn.Parameter(torch.ones(2))
    copy = weight_copy.cast(weight, torch.bfloat16)
    versions = [t._version for t in (weight, stale, plain)]
    weight_copy.written([weight, stale, plain])
    assert all(t._version > version for t, version in zip((weight, stale, plain), versions, strict=True))
    assert weight_copy.valid(weight) is copy
    assert weight_copy.valid(stale) is None  # it was none before


def test_a_backward_pass_behind_an_update_by_address_is_refused():
    weight, x = parameter(3, 5), torch.randn(2, 5).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = project(x, weight)
    weight_copy.written([weight])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.float().sum().backward()


def test_a_loaded_parameter_s_copy_is_not_taken_for_valid():
    weight = parameter(3, 5)
    weight_copy.refresh([weight])
    loaded = pickle.loads(pickle.dumps(weight))
    with torch.no_grad():
        while loaded._version < weight._version:
            loaded.add_(1)
    assert weight_copy.valid(loaded) is None
    assert torch.equal(weight_copy.cast(loaded, torch.bfloat16), loaded.bfloat16())


def test_other_dtypes_and_weights_without_a_copy_are_cast():
    weight, plain = parameter(3, 5), nn.Parameter(torch.randn(3, 5))
    assert torch.equal(weight_copy.cast(weight, torch.float16), weight.half())
    assert torch.equal(weight_copy.cast(plain, torch.bfloat16), plain.bfloat16())
    assert weight_copy.cast(plain, torch.float32) is plain
    assert weight_copy.valid(plain) is None
    weight_copy.refresh([plain])


@pytest.mark.parametrize(
    "op",
    [
        lambda x, weight: project(x, weight).float().square().sum(),
        lambda x, weight: linear_cross_entropy(x, weight, torch.arange(7)),
    ],
    ids=["projection", "head"],
)
def test_ops_use_the_copy_and_give_the_weight_its_gradient(op):
    x, values = torch.randn(7, 16).bfloat16(), torch.randn(11, 16)

    def gradient(weight: nn.Parameter) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            op(x, weight).backward()
        assert weight.grad is not None
        return weight.grad

    plain, kept = nn.Parameter(values.clone()), nn.Parameter(values.clone())
    weight_copy.keep(kept)
    assert torch.equal(gradient(kept), gradient(plain))
    copy = weight_copy.valid(kept)
    assert copy is not None
    # Used, not cast again: a copy with other values gives another result.
    kept.grad = None
    copy.zero_()
    assert not torch.equal(gradient(kept), plain.grad)
