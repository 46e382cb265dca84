"""Projections against torch.nn.Linear's arithmetic with autograd's own splits and sums."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from mamba_pretrain.ops.projection import project, project_beside, project_parts

WIDTHS = (6, 24, 3)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def operands(device="cpu", dtype=torch.float64, parameter_dtype=None, bias=True, d=16, length=7):
    """x (2, length, d), weight (33, d), bias (33,), all wanting gradients."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape, dtype):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype).requires_grad_()

    rows, own = sum(WIDTHS), parameter_dtype or dtype
    return draw(2, length, d, dtype=dtype), draw(rows, d, dtype=own), draw(rows, dtype=own) if bias else None


def whole(x, weight, bias):
    return (F.linear(x, weight, bias),)


def split(x, weight, bias):
    return F.linear(x, weight, bias).split(WIDTHS, dim=-1)


def beside(x, weight, bias):
    return x, F.linear(x, weight, bias)


KINDS = {
    "whole": (lambda *inputs: (project(*inputs),), whole),
    "parts": (lambda *inputs: project_parts(*inputs, WIDTHS), split),
    "beside": (project_beside, beside),
}


def upstream(outputs):
    """A gradient for each output, made anew."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.device, t.dtype) for t in outputs]


def gradients(outputs, inputs, given):
    """Of the inputs there are, for the outputs that ``given`` has a gradient for."""
    used = [(t, g) for t, g in zip(outputs, given, strict=True) if g is not None]
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    return torch.autograd.grad([t for t, _ in used], wanted, [g for _, g in used], allow_unused=True)


def assert_same(kind, inputs, given, tolerance=1e-12):
    """Outputs equal to the bit and equal gradients, where autograd's zeros may be our None."""
    op, reference = KINDS[kind]
    found, expected = op(*inputs), reference(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    # The gradient of an input beside its projection is overwritten: each side gets its own.
    ours, exact = (gradients(outputs, inputs, [None if g is None else g.clone() for g in given]) for outputs in (found, expected))
    for a, b in zip(ours, exact, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_values_and_gradients(kind, bias, device, dtype, tolerance):
    inputs = operands(device, dtype, bias=bias)
    assert_same(kind, inputs, upstream(KINDS[kind][1](*inputs)), tolerance)


@pytest.mark.parametrize("bias", [True, False])
def test_a_whole_projection_has_autograds_gradients_to_the_bit(bias):
    assert_same("whole", operands(dtype=torch.float32, bias=bias), upstream(whole(*operands(dtype=torch.float32))), tolerance=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 2)])
def test_what_is_frozen_gets_no_gradient(kind, frozen):
    inputs = operands()
    for i in frozen:
        inputs[i].requires_grad_(False)
    given = upstream(KINDS[kind][1](*inputs))
    if kind == "beside" and 0 in frozen:
        given[0] = None  # x itself needs none
    assert_same(kind, inputs, given)


@pytest.mark.parametrize(("kind", "unused"), [("parts", (0,)), ("parts", (1,)), ("parts", (0, 2)), ("beside", (0,)), ("beside", (1,))])
def test_an_output_that_nothing_uses(kind, unused):
    inputs = operands()
    given = [None if i in unused else g for i, g in enumerate(upstream(KINDS[kind][1](*inputs)))]
    assert_same(kind, inputs, given)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "layout",
    {
        "rows of a wider tensor": lambda g: torch.cat([g, g], -1)[..., : g.shape[-1]],
        "channel-first": lambda g: g.transpose(1, 2).contiguous().transpose(1, 2),
        "expanded": lambda g: g[..., :1].expand_as(g),
        "one number": lambda g: g.flatten()[0].expand_as(g),
    }.items(),
    ids=lambda pair: pair[0],
)
def test_gradients_of_any_strides(kind, layout):
    inputs = operands()
    op, reference = KINDS[kind]
    given = [layout[1](g) for g in upstream(reference(*inputs))]
    exact = gradients(reference(*inputs), inputs, given)
    for a, b in zip(gradients(op(*inputs), inputs, given), exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_an_input_of_any_strides(kind):
    x, weight, _ = operands(d=32)
    inputs = (x.detach()[..., ::2].requires_grad_(), weight.detach()[:, :16].requires_grad_(), None)
    assert_same(kind, inputs, upstream(KINDS[kind][1](*inputs)))


def test_no_tokens():
    inputs = operands(length=0)
    assert_same("parts", inputs, upstream(split(*inputs)))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, None])
def test_under_autocast(kind, device, low, dtype):
    """Values are those of torch.nn.Linear to the bit, gradients have the dtypes of what they belong to, and errors are those of ``low``."""
    inputs = operands(device, dtype or low, parameter_dtype=torch.float32)
    op, reference = KINDS[kind]
    with torch.autocast(device, dtype=low):
        found, expected = op(*inputs), reference(*inputs)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(found, expected, strict=True))
    exact_inputs = [t.detach().to(low).double().requires_grad_() for t in inputs]
    given = upstream(found)
    exact = gradients(reference(*exact_inputs), exact_inputs, [g.double() for g in given])
    for t, a, b in zip(inputs, gradients(found, inputs, given), exact, strict=True):
        assert a.dtype == t.dtype
        assert (a.double() - b).abs().max() <= 2 * torch.finfo(low).eps * b.abs().max()


def test_autocast_around_the_backward_pass_changes_nothing():
    inputs = operands(dtype=torch.float32)
    found = []
    for enabled in (False, True):
        outputs = project_parts(*inputs, WIDTHS)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            found.append(gradients(outputs, inputs, upstream(outputs)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.gpu
def test_a_weights_gradient_is_the_matmuls_own_fp32_sum():
    x, weight, _ = operands("cuda", torch.bfloat16, parameter_dtype=torch.float32, length=512)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        outputs = project_parts(x, weight, None, WIDTHS)
    given = upstream(outputs)
    _, dweight = gradients(outputs, (x, weight), given)
    exact = torch.cat(given, -1).flatten(0, 1).double().t() @ x.detach().flatten(0, 1).double()
    assert (dweight.double() - exact).abs().max() < 1e-4 * exact.abs().max()


class Seen(TorchDispatchMode):
    """Counts operators."""

    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        self.names[function.name().partition(".")[0].removeprefix("aten::")] += 1
        return function(*arguments, **(named or {}))


@pytest.mark.parametrize(("kind", "multiplications"), [("whole", 2), ("parts", 6), ("beside", 2)])
def test_the_backward_pass_is_matmuls_alone(kind, multiplications):
    inputs = operands(bias=False)
    outputs = KINDS[kind][0](*inputs)
    given = upstream(outputs)
    with Seen() as seen:
        gradients(outputs, inputs, given)
    assert seen.names["mm"] + seen.names["addmm"] == multiplications
    assert not {"cat", "add", "add_", "clone", "copy_", "_to_copy", "zeros", "zero_"} & seen.names.keys()


def test_the_gradient_of_an_input_beside_its_projection_is_added_in_place():
    x, weight, _ = operands()
    kept, projected = project_beside(x, weight)
    given = upstream((kept, projected))
    (dx,) = torch.autograd.grad([kept, projected], [x], given)
    assert dx.data_ptr() == given[0].data_ptr()


def test_a_weights_gradient_becomes_the_parameters_without_a_copy():
    inputs = operands(dtype=torch.float32)
    outputs = project_parts(*inputs, WIDTHS)
    given = upstream(outputs)
    with Seen() as seen:
        torch.autograd.backward(outputs, given)
    assert inputs[1].grad.shape == inputs[1].shape
    assert not {"clone", "copy_", "detach_copy"} & seen.names.keys()


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_a_weight_that_needs_no_cast_is_saved_itself(compute):
    """FSDP2 and ZeRO-3 free its storage after the forward pass and fill it again: a copy would keep the gathered weight alive."""
    x, weight, _ = operands(dtype=compute)
    saved = []
    note = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t)
    with note, torch.autocast("cpu", dtype=torch.bfloat16, enabled=compute == torch.bfloat16):
        project_parts(x, weight, None, WIDTHS)
    assert saved == [x.data_ptr(), weight.data_ptr()]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_computed_again_under_activation_checkpointing(kind, autocast):
    inputs = operands(dtype=torch.float32)
    op, found = KINDS[kind][0], []
    for again in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            outputs = checkpoint(op, *inputs, use_reentrant=False) if again else op(*inputs)
        found.append((*outputs, *gradients(outputs, inputs, upstream(outputs))))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_torch_compile_takes_it_whole(kind, autocast):
    inputs = operands(dtype=torch.float32)
    op = KINDS[kind][0]

    def loss(x, weight, bias):
        return sum((part.float().sin() * (i + 1)).sum() for i, part in enumerate(op(x, weight, bias)))

    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        eager, compiled = loss(*inputs), torch.compile(loss, backend="aot_eager", fullgraph=True)(*inputs)
    assert torch.equal(eager, compiled)
    for a, b in zip(torch.autograd.grad(eager, inputs), torch.autograd.grad(compiled, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_flops_are_counted(kind):
    inputs = operands(bias=False)
    with FlopCounterMode(display=False) as counter:
        outputs = KINDS[kind][0](*inputs)
        gradients(outputs, inputs, upstream(outputs))
    assert counter.get_total_flops() == 3 * 2 * 2 * 7 * 16 * sum(WIDTHS)


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_backward_pass_nothing_is_kept(kind):
    inputs = operands(dtype=torch.float32)
    with torch.no_grad():
        found = KINDS[kind][0](*inputs)
    assert all(torch.equal(a, b) and a.grad_fn is None for a, b in zip(found, KINDS[kind][1](*inputs), strict=True))
    with torch.inference_mode():
        assert torch.equal(KINDS[kind][0](*inputs)[-1], found[-1])


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_are_no_views_to_autograd(kind):
    inputs = operands()
    found = KINDS[kind][0](*inputs)
    assert not any(t._is_view() for t in found)  # FSDP2 would warn of each
    assert len({t.untyped_storage().data_ptr() for t in found}) == (2 if kind == "beside" else 1)  # and yet nothing is copied
    assert kind != "beside" or found[0].data_ptr() == inputs[0].data_ptr()


def test_widths_must_add_up():
    x, weight, bias = operands()
    with pytest.raises(ValueError, match=r"\(6, 24\) do not add up to the 33 outputs"):
        project_parts(x, weight, bias, (6, 24))


def test_dtypes_that_do_not_match_are_an_error_as_in_a_linear_layer():
    x, weight, _ = operands(dtype=torch.bfloat16, parameter_dtype=torch.float32)
    with pytest.raises(RuntimeError, match="dtype"):
        project(x, weight)
