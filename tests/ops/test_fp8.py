"""Projections whose matmuls run in FP8, against fp64 matmuls of what the casts store: emulated on a CPU, torch's scaled matmul on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from data_tools.errors import UserError
from mamba_pretrain.ops import flops, fp8  # noqa: F401  (registers formulas)
from mamba_pretrain.ops.fp8 import ACTIVATION, RECIPES
from mamba_pretrain.ops.fp8_cast import cast_columns, cast_rows
from mamba_pretrain.ops.projection import project, project_parts

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
WIDTHS = (128, 160, 16)
# Relative to the largest magnitude. Tensor cores add products of 8 bits with fewer bits than fp32 has (fast ones with fewer still), and
# gradients of x are then rounded to bf16.
TOLERANCE = {"cpu": 5e-3, "cuda": 1.5e-2}
NAMES = list(RECIPES)


def operands(device="cpu", rows=64, n_in=272, bias=False, widths=WIDTHS):
    """x bf16 (2, rows, in), fp32 weight and bias, and gradients of the parts; gradients of the last part are a thousandth of the others'."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape, dtype=torch.float32):
        return torch.randn(*shape, generator=generator).to(device, dtype)

    x = (draw(2, rows, n_in) * draw(n_in).exp()).bfloat16().requires_grad_()
    weight = (draw(sum(widths), n_in) * n_in**-0.5).requires_grad_()
    given = [draw(2, rows, width, dtype=torch.bfloat16) * (1e-3 if i == len(widths) - 1 else 1.0) for i, width in enumerate(widths)]
    return x, weight, draw(sum(widths)).requires_grad_() if bias else None, given


def forward(x, weight, bias, name, widths=WIDTHS):
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        return project_parts(x, weight, bias, widths, RECIPES.get(name))


def close(found, expected, tolerance):
    return (found.double() - expected.double()).abs().max() <= tolerance * expected.double().abs().max()


def error(found, exact):
    return ((found.double() - exact.double()).norm() / exact.double().norm()).item()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", NAMES)
def test_the_three_matmuls_are_those_of_the_casts(device, name):
    recipe = RECIPES[name]
    x, weight, bias, given = operands(device, bias=True)
    outputs = forward(x, weight, bias, name)
    dx, dweight, dbias = torch.autograd.grad(outputs, (x, weight, bias), given)
    assert [t.dtype for t in (*outputs, dx, dweight, dbias)] == [torch.bfloat16] * 4 + [torch.float32] * 2

    flat, dy = x.detach().flatten(0, 1), [g.flatten(0, 1) for g in given]
    low = {
        "x": cast_rows([flat], recipe.scaling, ACTIVATION),
        "x'": cast_columns([flat], recipe.scaling, ACTIVATION),
        "w": cast_rows([weight.detach()], recipe.scaling, ACTIVATION),
        "w'": cast_columns([weight.detach()], recipe.scaling, ACTIVATION),
        "dy": cast_rows(dy, recipe.scaling, recipe.gradient),
        "dy'": cast_columns(dy, recipe.scaling, recipe.gradient),
    }
    low = {key: scaled.restored().double() for key, scaled in low.items()}
    tolerance = TOLERANCE[device]
    assert close(torch.cat(outputs, -1).flatten(0, 1), low["x"] @ low["w"].t() + bias.double(), tolerance)
    assert close(dx.flatten(0, 1), low["dy"] @ low["w'"].t(), tolerance)
    assert close(dweight, low["dy'"] @ low["x'"].t(), tolerance)
    assert close(dbias, torch.cat(dy, 1).sum(0, dtype=torch.float64), 1e-2)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", NAMES)
def test_errors_are_those_of_three_or_four_bits(device, name):
    x, weight, _, given = operands(device)
    exact_inputs = [t.detach().double().requires_grad_() for t in (x, weight)]
    exact = F.linear(*exact_inputs).split(WIDTHS, -1)
    references = [*exact, *torch.autograd.grad(exact, exact_inputs, [g.double() for g in given])]
    outputs = forward(x, weight, None, name)
    found = [*outputs, *torch.autograd.grad(outputs, (x, weight), given)]
    largest = 0.08 if RECIPES[name].gradient == torch.float8_e5m2 else 0.05
    assert all(error(a, b) < largest for a, b in zip(found, references, strict=True))
    assert error(outputs[0], exact[0]) > 0.01, "or nothing was rounded to 8 bits"
    # The small part's weights learn from gradients a thousand times smaller than the others'.
    assert error(found[-1][-16:], references[-1][-16:]) < (0.08 if name != "rowwise" else 0.05)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("frozen", [(0,), (1,)])
def test_what_is_frozen_gets_no_gradient_and_changes_none(name, frozen):
    x, weight, _, given = operands()
    both = torch.autograd.grad(forward(x, weight, None, name), (x, weight), given)
    for i in frozen:
        (x, weight)[i].requires_grad_(False)
    wanted = [t for t in (x, weight) if t.requires_grad]
    alone = torch.autograd.grad(forward(x, weight, None, name), wanted, given)
    assert torch.equal(alone[0], both[1 - frozen[0]])


@pytest.mark.parametrize("name", NAMES)
def test_a_part_that_nothing_uses_counts_as_zero(name):
    x, weight, _, given = operands()
    outputs = forward(x, weight, None, name)
    some = torch.autograd.grad(outputs[1:], (x, weight), given[1:], retain_graph=True)
    whole = torch.autograd.grad(outputs, (x, weight), [torch.zeros_like(given[0]), *given[1:]])
    assert all(torch.equal(a, b) for a, b in zip(some, whole, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_gradients_and_inputs_of_any_strides(name):
    x, weight, _, given = operands()
    plain = torch.autograd.grad(forward(x, weight, None, name), (x, weight), given)
    turned = x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    strided = [torch.cat([g, g], -1)[..., : g.shape[-1]] for g in given[:2]] + [given[2].transpose(0, 2).contiguous().transpose(0, 2)]
    other = torch.autograd.grad(forward(turned, weight, None, name), (turned, weight), strided)
    assert all(torch.equal(a, b) for a, b in zip(plain, other, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_a_weight_that_is_in_bf16_already_is_kept_itself_and_gives_the_same(name):
    """FSDP2 frees its storage after the forward pass and fills it again: a copy of every layer's would undo that."""
    x, weight, _, given = operands()
    low = weight.detach().bfloat16().requires_grad_()
    saved = []
    note = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t)
    with note:
        outputs = forward(x, low, None, name)
    assert any(t.data_ptr() == low.data_ptr() for t in saved)
    assert sum(t.dtype == ACTIVATION for t in saved) == 1
    dx, dweight = torch.autograd.grad(outputs, (x, low), given)
    expected = torch.autograd.grad(forward(x, weight, None, name), (x, weight), given)
    assert torch.equal(dx, expected[0])
    assert torch.equal(dweight, expected[1].bfloat16())


@pytest.mark.parametrize("name", NAMES)
def test_half_the_bytes_are_kept(name):
    x, weight, _, _ = operands(rows=512)
    sizes = {}
    for precision in ("off", name):
        kept = {}
        note = torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.setdefault(t.data_ptr(), t), lambda t: t)
        with note:
            forward(x * 1, weight, None, precision)
        sizes[precision] = sum(t.numel() * t.element_size() for t in kept.values() if t.data_ptr() != weight.data_ptr())
    assert sizes[name] < 0.53 * sizes["off"]


@pytest.mark.parametrize("name", NAMES)
def test_without_a_backward_pass_it_is_bf16(name):
    x, weight, _, _ = operands(rows=5)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(forward(x, weight, None, name), forward(x, weight, None, "off"), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_computed_again_under_activation_checkpointing(name):
    x, weight, _, given = operands()
    plain = forward(x, weight, None, name)
    again = checkpoint(lambda x, weight: forward(x, weight, None, name), x, weight, use_reentrant=False)
    gradients = [torch.autograd.grad(outputs, (x, weight), given) for outputs in (plain, again)]
    assert all(torch.equal(a, b) for a, b in zip((*plain, *gradients[0]), (*again, *gradients[1]), strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", NAMES)
def test_flops_are_counted(device, name):
    x, weight, _, given = operands(device)
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(forward(x, weight, None, name), (x, weight), given)
    assert counter.get_total_flops() == 3 * 2 * x.shape[:-1].numel() * weight.numel()


@pytest.mark.parametrize("name", NAMES)
def test_torch_compile_takes_it_whole(name):
    x, weight, _, _ = operands()

    def loss(x, weight):
        return sum((part.float().sin() * (i + 1)).sum() for i, part in enumerate(forward(x, weight, None, name)))

    eager, compiled = loss(x, weight), torch.compile(loss, backend="aot_eager", fullgraph=True)(x, weight)
    torch.testing.assert_close(eager, compiled)
    for a, b in zip(torch.autograd.grad(eager, (x, weight)), torch.autograd.grad(compiled, (x, weight)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2 * b.abs().max().item())


@pytest.mark.parametrize(
    ("shape", "why"),
    [((2, 8, 40, 32), "widths are multiples of 16, not 40 to 32"), ((2, 8, 32, 24), "not 32 to 24"), ((1, 8, 32, 32), "16 tokens, not 8")],
)
def test_sizes_that_no_scaled_matmul_takes(shape, why):
    batch, length, n_in, n_out = shape
    weight = torch.randn(n_out, n_in, requires_grad=True)
    with pytest.raises(UserError, match=why):
        project(torch.randn(batch, length, n_in).bfloat16(), weight, None, RECIPES["rowwise"])


def test_devices(monkeypatch):
    cuda = torch.device("cuda", 0)
    assert fp8.unsupported("rowwise", torch.device("cpu")) is None
    assert fp8.unsupported("rowwise", torch.device("meta")) == "it needs an NVIDIA GPU"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "the GPU")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(fp8, "triton_missing", lambda: False)
    answers = {}
    for capability in ((8, 0), (8, 9), (9, 0), (10, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        answers[capability] = [fp8.unsupported(name, cuda) for name in ("tensorwise", "rowwise", "blockwise")]
    assert answers[8, 0] == ["it needs a GPU of compute capability 8.9 or newer, and the GPU has 8.0"] * 3
    assert answers[8, 9][:2] == answers[10, 0][:2] == [None, None]
    assert answers[9, 0] == [None] * 3
    assert "9.0 only" in answers[8, 9][2]
    assert "9.0 only" in answers[10, 0][2]
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert "CUDA 12.9 or newer" in fp8.unsupported("blockwise", cuda)


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_two_runs_give_the_same_bits(name):
    x, weight, _, given = operands("cuda", rows=2048, n_in=1024, widths=(1024, 1024))
    runs = []
    for _ in range(2):
        outputs = forward(x, weight, None, name, (1024, 1024))
        runs.append([*outputs, *torch.autograd.grad(outputs, (x, weight), given)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_replayed_from_a_cuda_graph(name):
    x, weight, _, given = operands("cuda")

    def work():
        outputs = forward(x, weight, None, name)
        return [*outputs, *torch.autograd.grad(outputs, (x, weight), given)]

    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = work()
    with torch.no_grad():
        x.copy_(x.flip(-1) * 3)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(recorded, work(), strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("n_in", "widths"), [(2048, (4096, 4096)), (4096, (2048,)), (1024, (2048, 2048 + 256, 32)), (2048, (4096, 4352, 64))]
)
def test_shapes_of_real_models(name, n_in, widths):
    """Every matmul is served, also where a dimension is no multiple of a block."""
    x, weight, _, given = operands("cuda", rows=1024, n_in=n_in, widths=widths)
    outputs = forward(x, weight, None, name, widths)
    dx, dweight = torch.autograd.grad(outputs, (x, weight), given)
    exact = [t.detach().float() for t in (x.flatten(0, 1), weight, torch.cat(given, -1).flatten(0, 1))]
    assert error(torch.cat(outputs, -1).flatten(0, 1), exact[0] @ exact[1].t()) < 0.05
    assert error(dx.flatten(0, 1), exact[2] @ exact[1]) < 0.08
    assert error(dweight, exact[2].t() @ exact[0]) < 0.08
