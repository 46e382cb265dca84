"""Operators called directly and through PyTorch's dispatcher."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from mamba_pretrain.ops.operator import Operator, observed, operator


@operator("test_scaled_forward")
def forward(x: Tensor, weight: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """x * weight * factor, and x + 1 for the backward pass."""
    return x * weight * factor, x + 1


@operator("test_scaled_backward")
def backward(dy: Tensor, weight: Tensor, kept: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight."""
    return dy * weight * factor, dy * (kept - 1) * factor


@forward.register_fake
def _(x, weight, factor):
    return torch.empty_like(x), torch.empty_like(x)


@backward.register_fake
def _(dy, weight, kept, factor):
    return torch.empty_like(dy), torch.empty_like(dy)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(inputs[1], output[1])
    ctx.factor = inputs[2]
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx, dy, _):
    return *backward(dy, *ctx.saved_tensors, ctx.factor), None


forward.register_autograd(_gradients, setup_context=_setup)


class Names(TorchDispatchMode):
    """Names of the operators called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        self.names.append(function.name())
        return function(*arguments, **(named or {}))


class Subclass(Tensor):
    pass


@pytest.fixture
def dispatched(monkeypatch):
    """Names of operators called through the dispatcher."""
    seen = []
    for one in (forward, backward):
        name, overload = one._name, one._overload
        monkeypatch.setattr(one, "_overload", lambda *a, name=name, overload=overload: (seen.append(name), overload(*a))[1])
    return seen


def results(x: Tensor, weight: Tensor) -> list[Tensor]:
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y, _ = forward(x, weight, 3.0)
    return [y, *torch.autograd.grad(y.sin().sum(), (x, weight))]


def test_where_nothing_looks_kernels_are_called_directly(dispatched):
    x, weight = torch.randn(5), nn.Parameter(torch.randn(5))
    results(x, weight)
    with torch.no_grad():
        forward(x, weight, 3.0)
    assert dispatched == []


def test_both_ways_give_the_same(monkeypatch):
    x, weight = torch.randn(5), torch.randn(5)
    direct = results(x, weight)
    monkeypatch.setattr("mamba_pretrain.ops.operator.observed", lambda *arguments: True)
    for a, b in zip(direct, results(x, weight), strict=True):
        assert torch.equal(a, b)


def test_dispatch_modes_see_operators_forward_and_backward():
    x = torch.randn(5, requires_grad=True)
    with Names() as outside:
        y = forward(x, torch.randn(5), 3.0)[0]
    loss = y.sum()
    with Names() as inside:
        loss.backward()
    assert "mamba_pretrain::test_scaled_forward" in outside.names
    assert "mamba_pretrain::test_scaled_backward" in inside.names


def test_who_is_an_observer():
    x = torch.randn(5)
    assert not observed(x, nn.Parameter(x), None, 3, 3.0, True, torch.float32)
    assert observed(x.as_subclass(Subclass))
    assert observed(x, None, x.as_subclass(Subclass))
    assert observed(x.to("meta"))
    assert not observed([x, x], "rowwise")
    assert observed([x.to("meta")], "rowwise")
    assert observed([x, x.as_subclass(Subclass)], "rowwise")
    with FakeTensorMode():
        assert observed(torch.randn(5))
    with Names():
        assert observed(x)
    seen = []
    torch.func.vmap(lambda t: (seen.append(observed(t)), t)[1])(x)
    torch.jit.trace(lambda t: (seen.append(observed(t)), t + 1)[1], x, check_trace=False)
    assert seen == [True, True]


def test_the_meta_device_gets_shapes():
    x = torch.empty(5, device="meta")
    assert forward(x, x, 3.0)[0].shape == (5,)


def test_compiles_into_the_operator():
    names = []

    def backend(graph, example):
        names.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    x = torch.randn(5)
    compiled = torch.compile(lambda t: forward(t, t, 3.0)[0], backend=backend, fullgraph=True)
    assert torch.equal(compiled(x), x * x * 3.0)
    assert "mamba_pretrain.test_scaled_forward.default" in names


def test_hooks_get_what_is_saved():
    """Offloading and activation checkpointing work by them."""
    seen = []
    x = torch.randn(5, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (seen.append(t.shape), t)[1], lambda t: t):
        forward(x, torch.randn(5), 3.0)[0].sum().backward()
    assert seen == [(5,), (5,)]


def test_a_second_derivative_is_refused_not_wrong():
    x = torch.randn(5, requires_grad=True)
    (first,) = torch.autograd.grad(forward(x, torch.randn(5), 3.0)[0].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        first.sum().backward()


def test_profiles_name_the_operator():
    x = torch.randn(5, requires_grad=True)
    with torch.profiler.profile() as profile:
        forward(x, torch.randn(5), 3.0)[0].sum().backward()
    names = {event.name for event in profile.events()}
    assert {"mamba_pretrain::test_scaled_forward", "mamba_pretrain::test_scaled_forwardBackward"} <= names


def test_it_is_the_function_in_words():
    assert isinstance(forward, Operator)
    assert forward.__doc__.startswith("x * weight")
    assert forward.__name__ == "forward"
