"""Choosing implementations."""

from __future__ import annotations

import logging

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from data_tools.errors import UserError
from mamba_pretrain.ops import registry
from mamba_pretrain.ops.config import OpsConfig
from mamba_pretrain.ops.registry import Request


@pytest.fixture(autouse=True)
def clean_registry(monkeypatch):
    """A registry with one made-up op, and the settings of a fresh process."""
    monkeypatch.setattr(registry, "_implementations", {})
    monkeypatch.setattr(registry, "_choices", {})
    monkeypatch.setattr(registry, "_settings", registry._Settings(loaded=True))
    registry.register("double", "reference", priority=0, slow_on_cuda=True)(lambda x: x + x)
    registry.register("double", "short", priority=10, unsupported=lambda r: "it takes one row" if r["x"].shape[0] > 1 else None)(
        lambda x: 2 * x
    )
    registry.register("halve", "reference", priority=0)(lambda x: x / 2)


def request_on(device: str, rows: int = 1) -> Request:
    with FakeTensorMode():
        return Request({"x": torch.empty(rows, 2, device=device)})


def test_the_best_that_can_serve_is_taken():
    assert registry.resolve("double", request_on("cpu")).name == "short"
    assert registry.resolve("double", request_on("cpu", rows=2)).name == "reference"


def test_each_choice_is_logged_once_with_its_reason(caplog):
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            registry.call("double", x=torch.ones(2, 2))
    assert [record.message for record in caplog.records] == ["double: reference on cpu (short: it takes one row)"]
    assert [(c.op, c.name, c.reason) for c in registry.choices()] == [("double", "reference", "short: it takes one row")]


def test_a_required_implementation_serves_or_fails_loudly():
    registry.configure(OpsConfig(require={"double": "short"}))
    assert registry.resolve("double", request_on("cpu")).name == "short"
    with pytest.raises(UserError, match=r"double=short, which cannot serve this call: it takes one row; possible here: reference"):
        registry.resolve("double", request_on("cpu", rows=2))


def test_one_name_is_required_of_every_op_that_has_it():
    registry.configure(OpsConfig(require="short"))
    assert registry.resolve("halve", request_on("cpu")).name == "reference"
    with pytest.raises(UserError, match="double=short"):
        registry.resolve("double", request_on("cpu", rows=2))


@pytest.mark.parametrize(
    ("require", "message"),
    [
        ("shrt", "did you mean short"),
        ({"duble": "short"}, "did you mean double"),
        ({"double": "refrence"}, "did you mean reference"),
        ({"halve": "short"}, "halve has no implementation short"),
    ],
)
def test_unknown_names_are_refused(require, message):
    with pytest.raises(UserError, match=message):
        registry.configure(OpsConfig(require=require))


def test_the_slow_path_on_cuda_is_refused_in_training_and_warned_about_elsewhere(caplog):
    slow = request_on("cuda", rows=2)
    with caplog.at_level(logging.WARNING):
        assert registry.resolve("double", slow).name == "reference"
    assert len(caplog.records) == 1
    registry.configure(OpsConfig())
    with pytest.raises(UserError, match="slow pure PyTorch on the GPU"):
        registry.resolve("double", slow)
    assert registry.resolve("double", request_on("cpu", rows=2)).name == "reference"
    registry.configure(OpsConfig(require={"double": "reference"}))
    assert registry.resolve("double", slow).name == "reference"


def test_using_holds_inside_the_block_only():
    request = request_on("cpu")
    with registry.using(double="reference"):
        assert registry.resolve("double", request).name == "reference"
    assert registry.resolve("double", request).name == "short"


def test_no_implementation_left_says_why():
    registry.register("third", "only", priority=0, unsupported=lambda r: "never")(lambda x: x)
    with pytest.raises(UserError, match=r"no implementation of third can serve this call \(only: never\)"):
        registry.resolve("third", request_on("cpu"))
