"""A split whose backward pass copies nothing, against autograd's own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from mamba_pretrain.ops import cc, registry
from mamba_pretrain.ops.split import parts, split
from mamba_pretrain.ops.ssd_scan import ssd_scan
from mamba_pretrain.parallel.recompute import checkpoint_options

SHAPES = ((4, 3), (2, 5), (2, 5))
WIDTH = 32
SCANS = ["reference", pytest.param("c", marks=pytest.mark.skipif(cc.compiler() is None, reason="there is no C compiler"))]


def plain(t: Tensor, *shapes: tuple[int, int]) -> list[Tensor]:
    pieces = t.split([rows * columns for rows, columns in shapes], dim=-1)
    return [piece.unflatten(-1, shape) for piece, shape in zip(pieces, shapes, strict=True)]


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def leaf(batch: int = 2, length: int = 7) -> Tensor:
    return draw(batch, length, WIDTH).requires_grad_()


def gradient(function, t: Tensor, given: list[Tensor | None]) -> Tensor:
    used = [(part, g) for part, g in zip(function(t, *SHAPES), given, strict=True) if g is not None]
    return torch.autograd.grad([part for part, _ in used], t, [g for _, g in used])[0]


def same_memory(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


class Seen(TorchDispatchMode):
    """Names of the operators called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        self.names.add(function.name())
        return function(*arguments, **(named or {}))


@pytest.mark.parametrize(
    "layout",
    {
        "whole": lambda t: t,
        "slice of a wider tensor": lambda t: torch.cat([t, t], -1)[..., 3 : 3 + WIDTH],
        "channel-first": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
        "every other channel": lambda t: torch.stack([t, t], -1).flatten(-2)[..., ::2],
    }.items(),
    ids=lambda pair: pair[0],
)
def test_parts_are_views(layout):
    t = layout[1](draw(2, 7, WIDTH))
    for found in (split(t, *SHAPES), split(t.requires_grad_(), *SHAPES), parts(t.detach(), SHAPES)):
        for a, b in zip(found, plain(t, *SHAPES), strict=True):
            assert torch.equal(a, b)
            assert (a.data_ptr(), a.stride()) == (b.data_ptr(), b.stride())


@pytest.mark.parametrize(("batch", "length"), [(2, 7), (1, 7), (2, 1), (1, 1), (0, 7), (2, 0)])
def test_neighbours_in_one_buffer_are_handed_on(batch, length):
    t, whole = leaf(batch, length), draw(batch, length, WIDTH)
    with Seen() as seen:
        found = gradient(split, t, list(parts(whole, SHAPES)))
    assert torch.equal(found, whole)
    assert found.data_ptr() == whole.data_ptr()
    assert not {"aten::cat", "aten::clone", "aten::copy_"} & seen.names


def test_neighbours_may_be_slices_themselves():
    t, wide = leaf(), draw(2, 7, 2 * WIDTH)
    found = gradient(split, t, list(parts(wide[..., 3 : 3 + WIDTH], SHAPES)))
    assert torch.equal(found, wide[..., 3 : 3 + WIDTH])
    assert same_memory(found, wide)


def several() -> dict[str, list[Tensor | None]]:
    """Gradients that are no neighbours, or not all."""
    first, second, third = parts(draw(2, 7, WIDTH), SHAPES)
    wide, other = draw(2, 7, 2 * WIDTH), draw(2, 7, WIDTH)
    return {
        "their own": [g.contiguous() for g in (first, second, third)],
        "in another order": [first, third, second],
        "one elsewhere": [first, second, parts(other, SHAPES)[2]],
        "a gap": [*parts(wide, SHAPES)[:2], parts(wide[..., 1:-1], (*SHAPES, (30, 1)))[2]],
        "another row stride": [first, *parts(wide, SHAPES)[1:]],
        "another batch": [first, second, torch.cat([third, third])[1:3]],
        "one number": [g[:1, :1, :1, :1].expand_as(g) for g in (first, second, third)],
        "the first missing": [None, second, third],
        "the last missing": [first, second, None],
        "channel-first": [g.transpose(1, 3).contiguous().transpose(1, 3) for g in (first, second, third)],
    }


@pytest.mark.parametrize("name", several())
def test_other_gradients_are_concatenated(name):
    given, t = several()[name], leaf()
    found = gradient(split, t, given)
    assert torch.equal(found, gradient(plain, t, given))
    assert not any(g is not None and same_memory(found, g) for g in given)


def test_a_part_that_is_used_twice():
    t, (first, second, third) = leaf(), parts(draw(2, 7, WIDTH), SHAPES)

    def grad(function) -> Tensor:
        a, b, c = function(t, *SHAPES)
        return torch.autograd.grad([a, b, c, a], t, [first, second, third, 2 * first])[0]

    assert torch.equal(grad(split), grad(plain))


def test_second_derivatives():
    t = leaf().double().detach().requires_grad_()

    def second(function) -> Tensor:
        whole = sum((part.pow(3) * (i + 1)).sum() for i, part in enumerate(function(t, *SHAPES)))
        (first,) = torch.autograd.grad(whole, t, create_graph=True)
        return torch.autograd.grad(first.square().sum(), t)[0]

    torch.testing.assert_close(second(split), second(plain))
    # Neighbours too: the gradient of each must be its own.
    scale = draw(2, 7, WIDTH).double().requires_grad_()
    a, b, c = split(t, *SHAPES)
    (first,) = torch.autograd.grad([a, b, c], t, parts(scale, SHAPES), create_graph=True)
    assert torch.equal(torch.autograd.grad(first.sum(), scale)[0], torch.ones_like(scale))


def test_compiles_without_a_graph_break():
    t = leaf()

    def loss(t: Tensor) -> Tensor:
        return sum((part.sin() * (i + 1)).sum() for i, part in enumerate(split(t, *SHAPES)))

    found = torch.compile(loss, backend="aot_eager", fullgraph=True)(t)
    assert torch.equal(torch.autograd.grad(found, t)[0], torch.autograd.grad(loss(t), t)[0])


def test_functorch_and_fake_tensors_and_the_meta_device():
    t = leaf().detach()
    assert torch.equal(
        torch.func.grad(lambda t: split(t, *SHAPES)[1].square().sum())(t), gradient(plain, leaf(), [None, 2 * parts(t, SHAPES)[1], None])
    )
    with FakeTensorMode():
        assert [part.shape for part in split(torch.empty(2, 7, WIDTH, requires_grad=True), *SHAPES)] == [(2, 7, *s) for s in SHAPES]
    whole = torch.empty(2, 7, WIDTH, device="meta")
    assert gradient(split, torch.empty_like(whole, requires_grad=True), list(parts(whole, SHAPES))).shape == whole.shape


# -- with a scan behind it ------------------------------------------------------------------------------------------------------------------


def scanned(function, name: str, t: Tensor, recompute: str = "none") -> tuple[Tensor, Tensor]:
    """y of a scan of parts of a tensor, and that tensor's gradient."""
    dt, A, D = draw(2, 7, 4), -draw(4).exp(), draw(4)

    def forward(t: Tensor) -> Tensor:
        x, B, C = function(t, *SHAPES)
        return ssd_scan(x, dt, A, B, C, D)

    with registry.using(ssd_scan=name):
        y = forward(t) if recompute == "none" else checkpoint(forward, t, **checkpoint_options(recompute))
        return y, torch.autograd.grad(y, t, draw(2, 7, 4, 3))[0]


@pytest.mark.parametrize("name", SCANS)
def test_a_scans_gradients_are_those_of_a_plain_split_to_the_bit(name):
    t = leaf()
    for a, b in zip(scanned(split, name, t), scanned(plain, name, t), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("recompute", ["none", "block", "selective"])
@pytest.mark.parametrize("name", SCANS)
def test_a_scans_gradients_are_handed_on(name, recompute):
    """Called directly; what is handed on is the memory that the scan wrote to."""
    t, seen = leaf(), []

    def watched(t: Tensor, *shapes: tuple[int, int]) -> tuple[Tensor, ...]:
        found = split(t, *shapes)
        for part in found:
            part.register_hook(seen.append)
        return found

    _, found = scanned(watched, name, t, recompute)
    assert len(seen) == 3
    assert all(same_memory(found, part) for part in seen)
    assert torch.equal(found, scanned(plain, name, t)[1])


@pytest.mark.parametrize("name", SCANS)
def test_a_scans_gradients_are_handed_on_by_operators(name):
    with Seen() as seen:
        _, found = scanned(split, name, leaf())
    assert any(name.startswith("mamba_pretrain::") and name.endswith("_backward") for name in seen.names)
    assert "aten::cat" not in seen.names
    assert torch.equal(found, scanned(plain, name, leaf())[1])


@pytest.mark.parametrize("name", SCANS)
def test_a_scan_of_separate_tensors(name):
    """Their gradients share memory, but no number; a parameter's own is a tensor of its own."""
    given = [part.detach().clone().requires_grad_() for part in parts(leaf(), SHAPES)]
    dt, A, dy = draw(2, 7, 4), -draw(4).exp(), draw(2, 7, 4, 3)
    with registry.using(ssd_scan=name):
        ssd_scan(given[0], dt, A, *given[1:]).backward(dy)
        whole = leaf()
        x, B, C = plain(whole, *SHAPES)
        ssd_scan(x, dt, A, B, C).backward(dy)
    for t, expected in zip(given, plain(whole.grad, *SHAPES), strict=True):
        assert torch.equal(t.grad, expected)
        assert t.grad.is_contiguous()
