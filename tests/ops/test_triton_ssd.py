"""Mamba-2's scan in Triton against the fp64 oracle: under Triton's interpreter on a CPU, and compiled on a GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mamba_pretrain.ops import registry, triton_ssd
from mamba_pretrain.ops.split import split
from mamba_pretrain.ops.ssd_scan import ssd_scan

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(
    not INTERPRETED, reason="runs in the subprocess that test_interpreted_on_cpu starts, with TRITON_INTERPRET=1"
)
# dA's share inside a chunk is a difference of sums, where steps of 25 stand beside steps of 1e-3: in fp32 that shows.
FP32 = 1e-4
SMALL = {"batch": 1, "heads": 3, "groups": 1, "tolerance": FP32}  # for the interpreter, which takes seconds
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [(64, 128), (32, 16), (64, 64), (128, 128), (64, 256), (128, 256)]  # channels a head, states


def tolerance(dtype: torch.dtype) -> float | None:
    return FP32 if dtype == torch.float32 else None


@pytest.fixture
def small_tiles(monkeypatch):
    """Lets short sequences have many chunks, of two tiles, and groups several programs."""
    monkeypatch.setattr(triton_ssd, "PORTABLE", replace(triton_ssd.PORTABLE, chunk=16, tile=16, tiles=2, heads=2))


@pytest.fixture
def short_segments(monkeypatch):
    """Lets even short sequences be cut."""
    monkeypatch.setattr(triton_ssd, "SHORTEST_SEGMENT", 16)
    monkeypatch.setattr(triton_ssd, "multiprocessors", lambda device: 1000)


def operands(
    batch: int, length: int, heads: int, width: int, groups: int, state: int, dtype: torch.dtype, device: str
) -> dict[str, Tensor]:
    """Random inputs as a Mamba-2 mixer has them: x, B and C parts of one tensor, dt of another."""
    torch.manual_seed(0)
    sizes = [heads * width, groups * state, groups * state]
    x, B, C = torch.randn(batch, length, sum(sizes), device=device).to(dtype).split(sizes, dim=-1)
    dt = torch.randn(batch, length, heads + 8, device=device).to(dtype)[..., 8:] - 2
    D, bias = torch.randn(2, heads, device=device)
    B, C = (t.unflatten(-1, (groups, state)) for t in (B, C))
    x = x.unflatten(-1, (heads, width))
    return {"x": x, "dt": dt, "A": -8 * torch.rand(heads, device=device) - 0.1, "B": B, "C": C, "D": D, "dt_bias": 0.3 * bias}


def outcome(arguments: dict[str, Tensor], seq_idx: Tensor | None = None) -> list[Tensor]:
    """Outputs and gradients of every input through the kernels."""
    inputs = {k: t.detach().requires_grad_() for k, t in arguments.items()}
    with registry.using(ssd_scan="triton"):
        y, final = ssd_scan(**inputs, seq_idx=seq_idx, return_final_state=True)
    generator = torch.Generator(y.device).manual_seed(1)
    upstream = [torch.randn(t.shape, generator=generator, device=t.device).to(t.dtype) for t in (y, final)]
    return [y, final, *torch.autograd.grad([y, final], list(inputs.values()), upstream)]


def check_parts(arguments: dict[str, Tensor]) -> None:
    """Gradients of x, B and C are neighbours in one buffer, which a split hands on; they are those of a plain split to the bit."""
    shapes = [arguments[name].shape[2:] for name in ("x", "B", "C")]
    others = {name: arguments[name] for name in ("dt", "A", "D", "dt_bias")}
    whole = torch.cat([arguments[name].flatten(2) for name in ("x", "B", "C")], -1).requires_grad_()
    dy, seen = torch.randn_like(arguments["x"]), []

    def run(*pieces: Tensor) -> Tensor:
        for piece in pieces:
            piece.register_hook(seen.append)
        with registry.using(ssd_scan="triton"):
            y = ssd_scan(pieces[0], B=pieces[1], C=pieces[2], **others)
        return torch.autograd.grad(y, whole, dy)[0]

    found = run(*split(whole, *shapes))
    assert all(g.untyped_storage().data_ptr() == found.untyped_storage().data_ptr() for g in seen)
    assert found.is_contiguous()
    widths = [shape.numel() for shape in shapes]
    expected = run(*(piece.unflatten(-1, shape) for piece, shape in zip(whole.split(widths, -1), shapes, strict=True)))
    assert torch.equal(found, expected)


def isolation(check, device: str, dtype: torch.dtype, start: int, sizes: tuple[int, ...]) -> None:
    inputs = operands(2, 100, *sizes, dtype, "cpu")
    shared = {name: inputs.pop(name).to(device) for name in ("A", "D", "dt_bias")}
    with registry.using(ssd_scan="triton"):
        check(ssd_scan, {k: t.float() if device == "cpu" else t for k, t in inputs.items()}, shared, start, device=device)


def test_what_cannot_be_served_is_said_in_words(monkeypatch):
    arguments = operands(1, 4, 2, 8, 1, 4, torch.float32, "cpu")
    if not INTERPRETED:
        assert "needs a CUDA device" in triton_ssd.unsupported(registry.Request(arguments))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "at most 128 channels a head and 256 states, not 8 and 257" in triton_ssd.unsupported(
        registry.Request({**arguments, "B": torch.zeros(1, 4, 1, 257)})
    )
    assert "no products in bf16" in triton_ssd.unsupported(registry.Request({**arguments, "x": arguments["x"].bfloat16()}))
    assert triton_ssd.unsupported(registry.Request(arguments)) is None
    wide = {"x": torch.zeros(1, 4, 2, 128), "B": torch.zeros(1, 4, 1, 256)}
    assert "fit in 65536 bytes, not 131072" in triton_ssd.unsupported(registry.Request({**arguments, **wide}))


def test_tracing_knows_the_shapes():
    arguments = operands(2, 5, 4, 8, 2, 4, torch.bfloat16, "meta")
    bounds = torch.zeros(2, 2, 5, dtype=torch.int32, device="meta")
    tensors = [arguments[k] for k in ("x", "dt", "A", "B", "C", "D")]
    options = (64, 0.0, float("inf"))
    y, final, kept = triton_ssd.forward(*tensors, None, arguments["dt_bias"], bounds, None, *options)
    assert (y.shape, y.dtype, final.shape, kept.numel()) == ((2, 5, 4, 8), torch.bfloat16, (2, 4, 8, 4), 0)
    found = triton_ssd.backward(y, None, *tensors, None, arguments["dt_bias"], bounds, kept, *options)
    # x, B and C have theirs in one tensor.
    x, dt, A, _, _, D = tensors
    expected = [x.new_empty(2, 5, 4 * 8 + 2 * 2 * 4), dt, A, D, None, arguments["dt_bias"], final]
    for gradient, of in zip(found, expected, strict=True):
        assert of is None or (gradient.shape == of.shape and gradient.dtype == of.dtype and gradient.is_contiguous())


# -- under the interpreter --------------------------------------------------------------------------------------------------------------------


QUICK = ["over-a-chunk", "starts-beside-chunk-edges", "only-what-is-required", "steps-of-all-sizes", "limited-steps"]


@interpreted
@pytest.mark.parametrize("name", QUICK)
def test_quick_cases_in_the_interpreter(ssd_cases, check_ssd_scan, small_tiles, name):
    check_ssd_scan(ssd_cases[name], "triton", **SMALL)


@interpreted
def test_all_cases_in_the_interpreter(short_ssd_scan_case, check_ssd_scan, small_tiles):
    check_ssd_scan(short_ssd_scan_case, "triton", **SMALL)


@interpreted
def test_halves_groups_and_single_tiles_in_the_interpreter(ssd_cases, check_ssd_scan, monkeypatch):
    monkeypatch.setattr(triton_ssd, "PORTABLE", replace(triton_ssd.PORTABLE, chunk=32, tile=16, tiles=1, heads=1))
    check_ssd_scan(ssd_cases["starts-beside-chunk-edges"], "triton", dtype=torch.float16, batch=1, heads=4, groups=2)


@interpreted
@pytest.mark.parametrize(("headdim", "state"), [(20, 40), (40, 130)])
def test_widths_in_the_interpreter(ssd_cases, check_ssd_scan, headdim, state):
    check_ssd_scan(ssd_cases["over-a-chunk"], "triton", headdim=headdim, state=state, **SMALL)


@interpreted
@pytest.mark.parametrize("name", ["over-64", "no-initial-state"])
def test_segments_in_the_interpreter(ssd_cases, check_ssd_scan, small_tiles, short_segments, name):
    check_ssd_scan(ssd_cases[name], "triton", **SMALL)


@interpreted
@pytest.mark.parametrize("start", [16, 33])
def test_documents_are_isolated_to_the_bit_in_the_interpreter(start, check_isolation, small_tiles):
    isolation(check_isolation, "cpu", torch.float32, start, (2, 4, 1, 5))


@interpreted
def test_strided_inputs_equal_contiguous_ones_in_the_interpreter(small_tiles):
    arguments = operands(2, 40, 2, 8, 1, 4, torch.float32, "cpu")
    assert not arguments["x"].is_contiguous()
    for a, b in zip(outcome(arguments), outcome({k: t.contiguous() for k, t in arguments.items()}), strict=True):
        assert torch.equal(a, b)


@interpreted
@pytest.mark.parametrize("width", [20, 16])  # of a head
def test_gradients_of_parts_are_handed_on_in_the_interpreter(small_tiles, width):
    check_parts(operands(2, 40, 6, width, 2, 5, torch.float32, "cpu"))


def interpret(tests: str) -> None:
    """Runs tests of this file in a process of their own: the interpreter must be chosen before triton is first imported."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", tests, __file__]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "passed" in result.stdout


NOT_HERE = INTERPRETED or importlib.util.find_spec("triton") is None
starts_interpreter = pytest.mark.skipif(NOT_HERE, reason="triton is not installed, or this is the subprocess")


@starts_interpreter
def test_interpreted_on_cpu():
    interpret("in_the_interpreter and not all_cases")


@pytest.mark.slow
@starts_interpreter
def test_all_cases_interpreted_on_cpu():
    interpret("all_cases_in_the_interpreter")


# -- on a GPU ---------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cases(short_ssd_scan_case, check_ssd_scan, dtype):
    check_ssd_scan(short_ssd_scan_case, "triton", device="cuda", dtype=dtype, headdim=64, state=128, tolerance=tolerance(dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["over-a-segment", "large-chunks"])
def test_long_cases(ssd_cases, check_ssd_scan, name):
    # With two heads both sums of dD over 2,051 steps happen to cancel, and the rounding of dy alone shows as 5%, in every implementation.
    check_ssd_scan(ssd_cases[name], "triton", device="cuda", dtype=torch.bfloat16, batch=1, heads=4, groups=1, headdim=64, state=128)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("headdim", "state"), SHAPES)
def test_widths(ssd_cases, check_ssd_scan, headdim, state, dtype):
    if headdim * state * dtype.itemsize > triton_ssd.MAX_STATE_BYTES:
        pytest.skip("refused")
    for name in ("starts-beside-chunk-edges", "odd-length", "no-initial-state"):
        check_ssd_scan(ssd_cases[name], "triton", device="cuda", dtype=dtype, headdim=headdim, state=state, tolerance=tolerance(dtype))


@pytest.mark.gpu
@pytest.mark.parametrize(("headdim", "state"), [(20, 64), (64, 40), (8, 64)])
def test_other_widths_are_refused(headdim, state):
    arguments = operands(1, 4, 2, headdim, 1, state, torch.bfloat16, "cuda")
    assert "powers of two from 16 on only" in triton_ssd.unsupported(registry.Request(arguments))


@pytest.mark.gpu
@pytest.mark.parametrize("tiles", [1, 2])
@pytest.mark.parametrize("keep", [True, False])
def test_tilings(ssd_cases, check_ssd_scan, monkeypatch, tiles, keep):
    for table in ("HOPPER", "PORTABLE"):
        monkeypatch.setattr(triton_ssd, table, replace(getattr(triton_ssd, table), tiles=tiles, keep=keep, heads=2))
    shape = {"batch": 3, "heads": 10, "headdim": 64, "groups": 2, "state": 128}
    check_ssd_scan(ssd_cases["decays-of-all-sizes"], "triton", device="cuda", dtype=torch.bfloat16, **shape)


@pytest.mark.gpu
def test_segments(short_ssd_scan_case, check_ssd_scan, short_segments):
    check_ssd_scan(short_ssd_scan_case, "triton", device="cuda", dtype=torch.bfloat16, headdim=64, state=128)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("start", [1, 64, 65, 99])
def test_documents_are_isolated_to_the_bit(start, dtype, check_isolation):
    isolation(check_isolation, "cuda", dtype, start, (4, 64, 2, 128))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_runs_are_equal_to_the_bit(dtype):
    arguments = operands(3, 1500, 8, 64, 2, 128, dtype, "cuda")
    seq_idx = (torch.rand(3, 1500, device="cuda") < 0.02).int().cumsum(1).int()
    for a, b in zip(outcome(arguments, seq_idx), outcome(arguments, seq_idx), strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("groups", [1, 2])
def test_gradients_of_parts_are_handed_on(groups, dtype):
    check_parts(operands(2, 300, 8, 64, groups, 128, dtype, "cuda"))


@pytest.mark.gpu
def test_strided_inputs_equal_contiguous_ones():
    arguments = operands(2, 300, 8, 64, 1, 128, torch.bfloat16, "cuda")
    assert not arguments["x"].is_contiguous()
    for a, b in zip(outcome(arguments), outcome({k: t.contiguous() for k, t in arguments.items()}), strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
def test_rows_far_apart():
    length, row = 300, 8_000_000  # offsets past 2^31
    wide = torch.empty(length * row, dtype=torch.bfloat16, device="cuda")
    x = wide.as_strided((1, length, 2, 64), (length * row, row, 64, 1))
    arguments = operands(1, length, 2, 64, 1, 128, torch.bfloat16, "cuda")
    x.copy_(arguments["x"])
    for a, b in zip(outcome({**arguments, "x": x}), outcome(arguments), strict=True):
        assert torch.equal(a, b)
