"""Gradients of parts that find each other in one buffer."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor

from mamba_pretrain.ops import beside
from mamba_pretrain.ops.beside import gradient_of, joined
from mamba_pretrain.ops.projection import project_parts

WIDTHS = (6, 24, 3)


@pytest.fixture(autouse=True)
def nothing_waits():
    assert not beside._waiting
    yield
    beside._waiting.clear()


def parts_of(batch: int = 2, length: int = 7, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    whole = torch.randn(batch, length, sum(WIDTHS)).to(dtype)
    return list(torch.unsafe_split_with_sizes(whole, WIDTHS, -1))


def lie_beside(*gradients: Tensor) -> bool:
    with torch.no_grad():
        return len(joined(gradients)) == 1


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
@pytest.mark.parametrize(("batch", "length"), [(2, 7), (1, 7), (2, 1), (1, 1)])
def test_parts_get_their_columns_of_one_buffer(order, batch, length):
    parts = parts_of(batch, length, torch.bfloat16)
    found: dict[int, Tensor] = {i: gradient_of(parts[i]) for i in order}
    for i, gradient in found.items():
        assert gradient.shape == parts[i].shape
        assert gradient.dtype == torch.bfloat16
        gradient.fill_(i + 1)
    with torch.no_grad():
        (whole,) = joined([found[i] for i in range(3)])
    assert whole.is_contiguous()
    assert whole.unique_consecutive(dim=-1)[0, 0].tolist() == [1, 2, 3]
    assert not beside._waiting


def test_every_backward_pass_has_a_buffer_of_its_own():
    parts = parts_of()
    first, second = ([gradient_of(part) for part in parts] for _ in range(2))
    assert lie_beside(*first)
    assert lie_beside(*second)
    assert first[0].data_ptr() != second[0].data_ptr()


def test_columns_are_given_once():
    parts = parts_of()
    first, again = gradient_of(parts[0]), gradient_of(parts[0])
    first.zero_()
    again.fill_(1)
    assert not first.any()
    others = [gradient_of(part) for part in parts[1:]]
    assert lie_beside(again, *others)  # of the buffer that was made last


def test_overlapping_parts_do_not_share():
    whole = torch.randn(2, 7, 33)
    left, right = whole[..., :20], whole[..., 13:]
    one, other = gradient_of(left), gradient_of(right)
    one.zero_()
    other.fill_(1)
    assert not one.any()


@pytest.mark.parametrize(
    "other",
    {
        "a whole tensor": lambda: torch.randn(2, 7, 6),
        "a part of part of a batch": lambda: torch.randn(4, 7, 33)[:2, :, :6],
        "a part of part of the length": lambda: torch.randn(2, 9, 33)[:, :7, :6],
        "every other channel": lambda: torch.randn(2, 7, 12)[..., ::2],
        "channel-first": lambda: torch.randn(2, 33, 7)[:, :6].transpose(1, 2),
        "a part of heads": lambda: torch.randn(2, 7, 5, 3)[:, :, :2],
        "a part along the wrong rows": lambda: torch.randn(7, 2, 33).transpose(0, 1)[..., :6],
        "nothing": lambda: torch.randn(2, 0, 33)[..., :6],
    }.items(),
    ids=lambda pair: pair[0],
)
def test_what_is_no_part_gets_contiguous_memory(other):
    gradient = gradient_of(other[1]())
    assert gradient.is_contiguous()
    assert not beside._waiting


def test_an_output_that_is_gone_is_not_mistaken_for_one_in_its_place():
    """What waits for a part that never comes is dropped, and found by no output that lies where the first one lay."""
    parts = parts_of()
    waiting = gradient_of(parts[0])
    assert len(beside._waiting) == 1
    address = parts[0].untyped_storage().data_ptr()
    del parts
    gc.collect()
    for _ in range(50):  # one of these takes the memory, as allocators do
        parts = parts_of()
        if parts[0].untyped_storage().data_ptr() == address:
            break
    second = gradient_of(parts[1])
    assert not lie_beside(waiting, second)
    assert len(beside._waiting) == 1  # the first has expired
    assert lie_beside(gradient_of(parts[0]), second)


def test_what_waits_in_vain_is_dropped_with_its_layer():
    """Only one part's user makes room: the buffer lives no longer than the projection's backward pass."""
    x, weight = torch.randn(2, 7, 16).requires_grad_(), torch.randn(33, 16).requires_grad_()
    outputs = [
        operation(part)
        for operation, part in zip((Halved.apply, lambda p: p / 2, lambda p: p / 2), project_parts(x, weight, None, WIDTHS), strict=True)
    ]
    total = sum(output.sum() for output in outputs)
    del outputs
    total.backward()
    assert x.grad is not None
    assert not beside._waiting


def test_only_neighbours_are_joined():
    a, b, c = (gradient_of(part) for part in parts_of())
    with torch.no_grad():
        assert [g.shape[-1] for g in joined([a, b.contiguous(), c])] == [6, 24, 3]
        assert [g.shape[-1] for g in joined([a, b, c.contiguous()])] == [30, 3]
        assert [g.shape[-1] for g in joined([a.contiguous(), b, c])] == [6, 27]
        assert [g.shape[-1] for g in joined([b, a, c])] == [24, 6, 3]
        assert [None if g is None else g.shape[-1] for g in joined([a, None, c])] == [6, None, 3]
    assert len(joined([a, b, c])) == 3  # autograd watches


class Halved(torch.autograd.Function):
    """An operation that makes the gradient of its input beside those of its siblings."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x / 2

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        return torch.div(dy, 2, out=gradient_of(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_projection_takes_neighbours_as_one(dtype):
    """The same gradients from one matmul each."""
    x, weight, bias = (torch.randn(*shape, dtype=dtype).requires_grad_() for shape in ((2, 7, 16), (33, 16), (33,)))
    given = [torch.randn(2, 7, width, dtype=dtype) for width in WIDTHS]

    def gradients(operation) -> tuple[tuple[Tensor, ...], int]:
        outputs = [operation(part) for part in project_parts(x, weight, bias, WIDTHS)]
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            found = torch.autograd.grad(outputs, (x, weight, bias), given)
        return found, sum(event.name in ("aten::mm", "aten::addmm") for event in profile.events())

    (found, few), (expected, many) = gradients(Halved.apply), gradients(lambda part: part / 2)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert (few, many) == (2, 6)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
def test_a_mixers_parts_find_each_other(kind, monkeypatch):
    """With our own kernels the input projection's gradient arrives in one piece, and gradients are those of separate pieces."""
    from mamba_pretrain.models.block import MIXER_CLASSES
    from mamba_pretrain.models.config import ModelConfig

    config = ModelConfig(mixer=kind, d_model=128, n_layer=1, vocab_size=64, headdim=32, d_state=16)
    mixer = MIXER_CLASSES[kind](config).cuda()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1)
    x, dy = torch.randn(2, 200, 128, device="cuda").requires_grad_(), torch.randn(2, 200, 128, device="cuda").bfloat16()

    def gradients() -> tuple[list[Tensor], list[int]]:
        pieces: list[int] = []
        monkeypatch.setattr(beside, "joined", lambda given: pieces.append(len(found := joined(given))) or found)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            y = mixer(x)
        found = torch.autograd.grad(y, [x, *mixer.parameters()], dy)
        return list(found), pieces

    found, pieces = gradients()
    assert not beside._waiting
    assert pieces == ([1] if kind == "mamba1" else [1, 1])  # Mamba-2's convolution has parts as well
    monkeypatch.setattr(beside, "_columns", lambda part: None)
    expected, pieces = gradients()
    assert max(pieces) > 1
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() <= 1e-2 * b.norm()
