"""The Triton kernels (norms, cross-entropy, sums, generation) against the reference: under Triton's interpreter on a CPU, and compiled on a GPU."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import os
import subprocess
import sys

import pytest
import torch

from mamba_pretrain.ops import cross_entropy, matmul, registry, triton_norm
from mamba_pretrain.ops.conv_step import conv_step
from mamba_pretrain.ops.cross_entropy import linear_cross_entropy
from mamba_pretrain.ops.matmul import add_few_inner
from mamba_pretrain.ops.projection import project_beside
from mamba_pretrain.ops.rms_norm import gated_rms_norm, rms_norm
from mamba_pretrain.ops.selective_step import selective_step
from mamba_pretrain.ops.ssd_step import ssd_step
from mamba_pretrain.ops.triton_launch import launch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = (torch.float32, torch.bfloat16)


def outputs_and_gradients(op: str, name: str, call, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Outputs, and gradients by all inputs, through one implementation."""
    torch.manual_seed(1)
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    with registry.using(**{op: name}):
        found = call(*leaves)
    found = found if isinstance(found, tuple) else (found,)
    gradients = torch.autograd.grad(found, leaves, [torch.randn(t.shape).to(t.device, t.dtype) for t in found])
    return [*found, *gradients]


def check(op: str, call, inputs: list[torch.Tensor]) -> None:
    # Twice: a kernel's second launch takes another way than its first.
    found, again, expected = (outputs_and_gradients(op, name, call, inputs) for name in ("triton", "triton", "reference"))
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        tolerance = 1e-5 if a.dtype == torch.float32 and inputs[0].dtype == torch.float32 else 1.6e-2
        # Of a row of one element the gradient is what rounding leaves of terms of about one that cancel.
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * max(b.abs().max().item(), 0.1))


def check_all(device: str, sizes: tuple[int, ...]) -> None:
    """Both norms over dtypes, sizes, with and without residual, strided inputs and groups."""
    for dtype, n in itertools.product(DTYPES, sizes):
        torch.manual_seed(0)
        x, weight, residual = torch.randn(2, 5, n).to(device, dtype), torch.randn(n).to(device), torch.randn(2, 5, n).to(device)
        check("rms_norm", lambda x, w: rms_norm(x, w, 1e-5), [x, weight])
        check("rms_norm", lambda x, w, r: rms_norm(x, w, 1e-5, residual=r), [x, weight, residual])
        both = torch.randn(2, 5, 4 * n).to(device, dtype)
        check("gated_rms_norm", lambda t, w, n=n: gated_rms_norm(t[..., :n], t[..., 2 * n : 3 * n], w, 1e-5), [both, weight])
        groups = torch.randn(2, 5, 6 * n).to(device, dtype)
        weight = torch.randn(3 * n).to(device)
        check("gated_rms_norm", lambda t, w, n=n: gated_rms_norm(t[..., : 3 * n], t[..., 3 * n :], w, 1e-5, n), [groups, weight])


def check_gated_parts(device: str, shapes: tuple[tuple[int, int, int], ...]) -> None:
    """A gradient of z that is part of a wider tensor, of which the rest stays as it was; and zeros where the gate is shut."""
    for dtype, (rows, n, size) in itertools.product(DTYPES, shapes):
        torch.manual_seed(0)
        dy, x, z = torch.randn(3, rows, n).to(device, dtype)
        z[:, 0], z[:, -1] = -200, 200
        weight = torch.randn(n).to(device)
        _, scale = triton_norm.gated_forward(x, z, weight, 1e-5, size, dtype)
        dx, dz, dweight = triton_norm.gated_backward(dy, x, z, weight, scale, size)
        assert all(bool(t.isfinite().all()) for t in (dx, dz, dweight))
        assert not bool(dx[:, 0].any() or dz[:, 0].any())
        wider = torch.full((rows, 2 * n + 8), 7.0).to(device, dtype)
        part = wider[:, n + 3 : 2 * n + 3]
        with torch.no_grad():
            others = triton_norm.gated_backward(dy, x, z, weight, scale, size, gradient=lambda z, part=part: part)
        assert others[1] is part
        assert all(torch.equal(a, b) for a, b in zip(others, (dx, dz, dweight), strict=True))
        assert bool((wider[:, : n + 3] == 7).all())
        assert bool((wider[:, 2 * n + 3 :] == 7).all())


def check_sum_of_parts(device: str, shapes: tuple[tuple[int, int], ...]) -> None:
    for dtype, (parts, n) in itertools.product(DTYPES, shapes):
        torch.manual_seed(0)
        values = torch.randn(parts, n).to(device)
        found = triton_norm._sum_parts(values, torch.empty(n, device=device, dtype=dtype))
        expected = values.double().sum(0)
        tolerance = 1e-6 if dtype == torch.float32 else 2**-7  # of bf16's last digit: the interpreter does not round to the nearest
        assert found.dtype == dtype
        assert found.shape == (n,)
        assert bool(((found - expected).abs() <= tolerance * (expected.abs() + parts**0.5)).all())


def check_cross_entropy(device: str, sizes: tuple[int, ...]) -> None:
    """Loss and gradients, with padding of the vocabulary and ignored labels, in chunks; and the loss alone."""
    for dtype, rows in itertools.product(DTYPES, sizes):
        torch.manual_seed(0)
        hidden, weight = torch.randn(2, 5, 8).to(device, dtype), torch.randn(rows, 8).to(device)
        valid = rows - rows // 10
        labels = torch.randint(0, valid, (2, 5)).masked_fill(torch.rand(2, 5) < 0.3, -100).to(device)

        def loss(h, w, valid=valid, labels=labels):
            return linear_cross_entropy(h, w, labels, valid_vocab=valid)

        check("linear_cross_entropy", loss, [hidden, weight])
        losses = []
        for name in ("triton", "reference"):
            with torch.no_grad(), registry.using(linear_cross_entropy=name):
                losses.append(loss(hidden, weight))
        torch.testing.assert_close(*losses)


def check_few_inner(device: str, dtype: torch.dtype, rows: int, shapes: tuple[tuple[int, int], ...]) -> None:
    """Products added to matrices that are parts of wider ones, of as many inner numbers and columns as ``shapes`` say."""
    for inner, columns in shapes:
        torch.manual_seed(0)
        wide, a, b = torch.randn(rows + 2, columns + 32), torch.randn(rows, inner + 16), torch.randn(inner, columns + 48)
        wide, a, b = (t.to(device, dtype) for t in (wide, a, b))
        before, total, a, b = wide.clone(), wide[1:-1, 16 : 16 + columns], a[:, :inner], b[:, 16 : 16 + columns]
        exact = total.double() + a.double() @ b.double()
        for _ in range(2):  # a kernel's second launch takes another way than its first
            wide.copy_(before)
            add_few_inner(total, a, b)
            tolerance = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps / 2 * 1.01  # one rounding, of fp32 sums
            torch.testing.assert_close(total.double(), exact, rtol=tolerance, atol=1e-4)
            total.copy_(before[1:-1, 16 : 16 + columns])
            assert torch.equal(wide, before), "nothing around it is written"


def check_few_inner_compiled(monkeypatch) -> None:
    """Within a projection's backward pass, compiled and not, against torch's sum."""
    x, weight = torch.randn(2, 40, 32, requires_grad=True), torch.randn(16, 32, requires_grad=True)

    def loss(x, weight):
        kept, y = project_beside(x, weight)
        return (2 * kept.sin()).sum() + y.sin().sum()

    expected = torch.autograd.grad(loss(x, weight), [x, weight])
    monkeypatch.setattr(matmul, "_few_inner", lambda *operands: True)
    for function in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        for a, b in zip(torch.autograd.grad(function(x, weight), [x, weight]), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def check_step(op: str, call, inputs: dict[str, torch.Tensor], state: torch.Tensor) -> None:
    """Two tokens: the second result shows what the first left in the state."""
    found = []
    for name in ("triton", "reference"):
        left = state.clone()
        with torch.no_grad(), registry.using(**{op: name}):
            results = [call(**inputs, state=left) for _ in range(2)]
        found.append([*results, left])
    for a, b in zip(*found, strict=True):
        assert a.dtype == b.dtype
        exact = {t.dtype for t in (a, state, next(iter(inputs.values())))} == {torch.float32}
        tolerance = 1e-5 if exact else 1.6e-2
        # Of a row of one element the gradient is what rounding leaves of terms of about one that cancel.
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * max(b.abs().max().item(), 0.1))


def check_steps(device: str, batches: tuple[int, ...]) -> None:
    """Odd widths, inputs that are slices of wider ones, low-precision states, tiny and large step sizes."""
    for dtype, recurrent in itertools.product(DTYPES, DTYPES):
        torch.manual_seed(0)

        def draw(*shape, dtype=torch.float32):
            return torch.randn(shape).to(device, dtype)

        for b in batches:  # the kernel walks over rows, as many as their number suggests
            d, n, r = 50, 12, 7
            u, z = draw(b, 2 * d, dtype=dtype).chunk(2, dim=1)
            dt, B, C = draw(b, r + 2 * n, dtype=dtype).split([r, n, n], dim=1)
            inputs = {"u": u, "dt": dt, "dt_weight": draw(d, r, dtype=dtype), "B": B, "C": C, "z": z, "A_log": draw(d, n), "D": draw(d)}
            inputs |= {"dt_bias": torch.linspace(-12, 25, d).to(device)}
            check_step("selective_step", selective_step, inputs, draw(b, d, n, dtype=recurrent))
        for groups, limit in ((1, (0.0, float("inf"))), (3, (0.05, 0.5))):
            h, p, n = 6, 20, 12
            x, B, C = draw(2, h * p + 2 * groups * n, dtype=dtype).split([h * p, groups * n, groups * n], dim=1)
            inputs = {"x": x.unflatten(1, (h, p)), "dt": draw(2, 2 * h, dtype=dtype)[:, h:]}
            inputs |= {"B": B.unflatten(1, (groups, n)), "C": C.unflatten(1, (groups, n)), "A_log": draw(h), "D": draw(h)}
            inputs |= {"dt_bias": torch.linspace(-12, 25, h).to(device)}
            check_step("ssd_step", functools.partial(ssd_step, dt_limit=limit), inputs, draw(2, h, p, n, dtype=recurrent))
        for taps, bias in ((2, True), (3, False), (4, True)) if recurrent == dtype else ():
            inputs = {"x": draw(2, 300, dtype=dtype)[:, 3:203], "weight": draw(200, taps, dtype=dtype)}
            check_step("conv_step", conv_step, inputs | {"bias": draw(200) if bias else None}, draw(2, taps - 1, 200, dtype=dtype))


@pytest.mark.skipif(not INTERPRETED, reason="runs in the subprocess that test_interpreted_on_cpu starts, with TRITON_INTERPRET=1")
def test_in_the_interpreter(monkeypatch):
    monkeypatch.setitem(cross_entropy.CHUNK_ELEMENTS, "cpu", 1)
    monkeypatch.setattr(cross_entropy, "MIN_ROWS", 4)
    check_all("cpu", (24, 100))
    check_gated_parts("cpu", ((2, 24, 8), (65, 100, 100), (300, 48, 16)))
    check_sum_of_parts("cpu", ((1, 1), (3, 100), (264, 24), (600, 33)))
    four_rows = triton_norm.Tuning(rows=4, stages=2, resident=32, channels=4)
    monkeypatch.setattr(triton_norm, "RMS_BACKWARD", four_rows)
    monkeypatch.setattr(triton_norm, "GATED_FORWARD", four_rows)
    monkeypatch.setattr(triton_norm, "GATED_BACKWARD", {triton_norm.MAX_CHANNELS: four_rows})
    check_all("cpu", (24,))
    check_gated_parts("cpu", ((65, 24, 8),))
    check_cross_entropy("cpu", (3, 40, 5000))
    check_few_inner("cpu", torch.float32, 300, ((160, 272), (16, 128), (48, 16), (96, 400), (256, 64), (240, 128)))
    check_few_inner_compiled(monkeypatch)
    check_steps("cpu", (1, 32))


@pytest.mark.skipif(INTERPRETED, reason="already in the subprocess")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_interpreted_on_cpu():
    # The interpreter must be chosen before triton is first imported.
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "in_the_interpreter", __file__]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "1 passed" in result.stdout


class Kernel:
    """Stands for a Triton kernel and for what is compiled of it; keeps the arguments of its launches."""

    arg_names = ("x", "y", "n", "eps", "FLAG", "BLOCK")

    def __init__(self):
        self.launched = []
        self.compiled = 0

    def __getitem__(self, grid):
        def run(*arguments, **options):
            self.launched.append((grid, arguments, options))
            self.compiled += bool(options)
            return self

        return run


def test_the_second_launch_of_a_kind_goes_past_triton():
    kernel, x = Kernel(), torch.zeros(4, 16)
    for _ in range(2):
        launch(kernel, (4, 1, 1), x, None, 16, 1e-5, BLOCK=32, FLAG=True, num_warps=4)
    assert kernel.compiled == 1
    assert kernel.launched[0] == ((4, 1, 1), (x, None, 16, 1e-5), {"BLOCK": 32, "FLAG": True, "num_warps": 4})
    assert kernel.launched[1] == ((4, 1, 1), (x.data_ptr(), None, 16, 1e-5, True, 32), {})


@pytest.mark.parametrize(
    ("arguments", "warps"),
    [
        ((torch.zeros(4, 16).bfloat16(), None, 16), 4),
        ((torch.zeros(4, 16).flatten()[1:], None, 16), 4),
        ((torch.zeros(4, 16), torch.zeros(4), 16), 4),
        ((torch.zeros(4, 16), None, 17), 4),
        ((torch.zeros(4, 16), None, 16), 8),
    ],
    ids=["dtype", "alignment", "presence", "number", "warps"],
)
def test_another_kind_is_compiled_anew(arguments, warps):
    kernel = Kernel()
    launch(kernel, (4, 1, 1), torch.zeros(4, 16), None, 16, 1e-5, True, 32, num_warps=4)
    launch(kernel, (4, 1, 1), *arguments, 1e-5, True, 32, num_warps=warps)
    assert kernel.compiled == 2


@pytest.mark.gpu
def test_on_gpu():
    check_all("cuda", (1, 24, 100, 2048, 2560, 4096))
    check_gated_parts("cuda", ((65, 24, 8), (300, 100, 100), (777, 4096, 4096)))
    check_sum_of_parts("cuda", ((1, 1), (3, 100), (264, 2048), (600, 33)))
    check_cross_entropy("cuda", (3, 40, 5000, 24000, 50280, 128256))
    for dtype in (torch.bfloat16, torch.float16):
        check_few_inner("cuda", dtype, 5000, ((160, 4096), (96, 2048), (16, 128), (48, 16), (256, 1040), (240, 400)))
    check_steps("cuda", (1, 9, 34, 64))


@pytest.mark.gpu
def test_the_weight_gradient_is_deterministic():
    torch.manual_seed(0)
    x, weight = torch.randn(4096, 2560, device="cuda").bfloat16(), torch.randn(2560, device="cuda")
    runs = [outputs_and_gradients("rms_norm", "triton", lambda x, w: rms_norm(x, w, 1e-5), [x, weight]) for _ in range(3)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))
