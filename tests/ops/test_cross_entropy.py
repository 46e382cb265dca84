"""Linear cross-entropy against whole logits in fp64."""

from __future__ import annotations

import weakref
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from mamba_pretrain.ops import cross_entropy, cuda_softmax_kernels
from mamba_pretrain.ops.cross_entropy import linear_cross_entropy


def whole(hidden, weight, labels, valid=None):
    logits = (hidden @ weight.t())[..., :valid]
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=-100, reduction="sum")


def data(rows=40, valid=40, d=8, dtype=torch.float32):
    torch.manual_seed(0)
    hidden, weight = torch.randn(3, 50, d).to(dtype).requires_grad_(), torch.randn(rows, d, requires_grad=True)
    labels = torch.randint(0, valid, (3, 50))
    labels[0, :20] = -100
    labels[2, 7] = -100
    return hidden, weight, labels


@pytest.mark.parametrize("chunk_elements", [1, 70 * 40, 1 << 21])
@pytest.mark.parametrize("valid", [None, 37])
def test_loss_and_gradients(chunk_elements, valid, monkeypatch):
    monkeypatch.setattr(cross_entropy, "MIN_ROWS", 1)
    monkeypatch.setitem(cross_entropy.CHUNK_ELEMENTS, "cpu", chunk_elements)
    hidden, weight, labels = data(valid=valid or 40)
    loss = linear_cross_entropy(hidden, weight, labels, valid_vocab=valid)
    exact_hidden, exact_weight = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    exact = whole(exact_hidden, exact_weight, labels, valid)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=1e-6)
    found = torch.autograd.grad(loss * 0.37, [hidden, weight])
    expected = torch.autograd.grad(exact * 0.37, [exact_hidden, exact_weight])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)
    if valid:
        assert torch.count_nonzero(found[1][valid:]) == 0


def test_the_loss_is_the_same_where_no_gradient_is_wanted():
    hidden, weight, labels = data()
    with torch.no_grad():
        evaluated = linear_cross_entropy(hidden, weight, labels)
    assert not evaluated.requires_grad
    assert torch.equal(evaluated, linear_cross_entropy(hidden, weight, labels).detach())


def test_nothing_to_predict_gives_zero_loss_and_gradient():
    hidden, weight, labels = data()
    loss = linear_cross_entropy(hidden, weight, torch.full_like(labels, -100))
    assert loss.item() == 0
    assert all(torch.count_nonzero(g) == 0 for g in torch.autograd.grad(loss, [hidden, weight]))


def test_no_tokens_give_zero_loss_and_gradient():
    hidden, weight, labels = data()
    loss = linear_cross_entropy(hidden[:, :0], weight, labels[:, :0])
    assert loss.item() == 0
    assert all(torch.count_nonzero(g) == 0 for g in torch.autograd.grad(loss, [hidden, weight]))


def test_a_second_pass_through_one_graph_is_refused_not_wrong():
    hidden, weight, labels = data()
    loss = linear_cross_entropy(hidden, weight, labels)
    torch.autograd.grad(loss, [hidden, weight], retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, [hidden, weight])


def test_another_ignored_label():
    hidden, weight, labels = data()
    assert torch.equal(linear_cross_entropy(hidden, weight, labels.masked_fill(labels == -100, 3), ignore_index=3).detach(),
                       linear_cross_entropy(hidden, weight, labels.masked_fill(labels == 3, -100)).detach())  # fmt: skip


def test_under_autocast_the_matmuls_are_bf16_and_gradients_keep_their_dtypes():
    hidden, weight, labels = data(dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, labels)
    exact = whole(hidden.detach().double(), weight.detach().double(), labels)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=1e-2)
    assert loss.item() != pytest.approx(exact.item(), rel=1e-6)
    dhidden, dweight = torch.autograd.grad(loss, [hidden, weight])
    assert (dhidden.dtype, dweight.dtype) == (torch.bfloat16, torch.float32)


def test_large_logits_do_not_overflow():
    hidden, weight, labels = data()
    loss = linear_cross_entropy(1e4 * hidden.detach(), weight, labels)
    assert torch.isfinite(loss)


@pytest.mark.parametrize(("tokens", "rows"), [(1, 40), (150, 40), (5000, 50280)])
def test_chunks_cover_the_tokens_within_the_budget(tokens, rows):
    hidden, weight = torch.empty(tokens, 2), torch.empty(rows, 2)
    chunks = cross_entropy._chunks(hidden, weight)
    assert [i for s in chunks for i in range(tokens)[s]] == list(range(tokens))
    assert max(len(range(tokens)[s]) for s in chunks) * rows <= max(cross_entropy.CHUNK_ELEMENTS["cpu"], cross_entropy.MIN_ROWS * rows)


@pytest.mark.parametrize("gradient", [True, False])
def test_a_chunks_logits_are_gone_before_the_next_come(gradient, monkeypatch):
    hidden, weight, labels = data()
    alive, found, linear, losses = weakref.WeakSet(), [], F.linear, cross_entropy._losses

    def watched_linear(*arguments):
        found.append(len(alive))
        return linear(*arguments)

    def watched_losses(*arguments, **named):
        result = losses(*arguments, **named)
        alive.add(result[1].untyped_storage())
        return result

    monkeypatch.setitem(cross_entropy.CHUNK_ELEMENTS, "cpu", labels.numel() // 3 * weight.shape[0])
    monkeypatch.setattr(cross_entropy, "MIN_ROWS", 1)
    monkeypatch.setattr(F, "linear", watched_linear)
    monkeypatch.setattr(cross_entropy, "_losses", watched_losses)
    with torch.set_grad_enabled(gradient):
        linear_cross_entropy(hidden, weight, labels)
    assert found == [0, 0, 0]


def test_compiles_without_a_graph_break():
    hidden, weight, labels = data()
    expected = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels), [hidden, weight])
    compiled = torch.compile(lambda *t: linear_cross_entropy(*t, labels), backend="aot_eager", fullgraph=True)
    for a, b in zip(torch.autograd.grad(compiled(hidden, weight), [hidden, weight]), expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("columns", "stride", "dtype", "served"),
    [
        (50304, 50304, torch.bfloat16, True),
        (50280, 50288, torch.float16, True),
        (32000, 32000, torch.bfloat16, True),
        (32000, 32000, torch.float32, False),
        (16384, 16384, torch.bfloat16, True),
        (16376, 16376, torch.bfloat16, False),
        (50277, 50277, torch.bfloat16, False),
        (50304, 50308, torch.bfloat16, False),
        (57984, 57984, torch.bfloat16, True),
        (57992, 57992, torch.bfloat16, False),
        (128256, 128256, torch.bfloat16, False),
    ],
)
def test_rows_of_which_two_fit_are_kept_in_shared_memory(columns, stride, dtype, served, monkeypatch):
    class Logits:
        """A description of logits on a Hopper."""

        device, shape = torch.device("cuda:0"), (4, columns)

        def __init__(self):
            self.element_size, self.data_ptr, self.get_device = lambda: dtype.itemsize, lambda: 256, lambda: 0

        def stride(self, dimension):
            return (stride, 1)[dimension]

    monkeypatch.setattr(cuda_softmax_kernels.nvrtc, "unsupported", lambda device: None)
    properties = SimpleNamespace(shared_memory_per_multiprocessor=228 * 1024)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    cuda_softmax_kernels.longest_row.cache_clear()
    assert cuda_softmax_kernels.serves(Logits()) is served
    cuda_softmax_kernels.longest_row.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("columns", [16384, 32000, 50304])
def test_a_kernel_for_long_rows_on_gpu(columns):
    generator = torch.Generator("cuda").manual_seed(0)
    logits = (4 * torch.randn(300, columns, device="cuda", generator=generator)).bfloat16()
    valid = columns - 27
    targets = torch.randint(0, valid, (300,), device="cuda", generator=generator)
    targets[::7] = -100
    expected, exact = cross_entropy._losses(logits.float(), targets, -100, valid, gradient=True)
    assert cuda_softmax_kernels.serves(logits)
    runs = [cross_entropy._fused_losses(logits.clone(), targets, -100, valid, gradient=True) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    torch.testing.assert_close(runs[0][0], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(runs[0][1].float(), exact, rtol=torch.finfo(torch.bfloat16).eps, atol=1e-6)
    losses, left = cross_entropy._fused_losses(logits.clone(), targets, -100, valid, gradient=False)
    assert torch.equal(losses, runs[0][0])
    assert torch.equal(left, logits)


@pytest.mark.gpu
def test_on_gpu_in_bf16():
    hidden, weight, labels = (t.detach().cuda() for t in data(rows=1000, valid=997, d=64))
    hidden = hidden.bfloat16().requires_grad_()
    weight.requires_grad_()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, labels, valid_vocab=997)
    exact_hidden, exact_weight = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    exact = whole(exact_hidden, exact_weight, labels, 997)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-2, atol=0)
    expected = torch.autograd.grad(exact, [exact_hidden, exact_weight])
    for a, b in zip(torch.autograd.grad(loss, [hidden, weight]), expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=2e-2 * b.abs().max().item())
