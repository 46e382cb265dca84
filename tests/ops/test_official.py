"""What mamba-ssm and causal-conv1d are asked for: predicates on any machine, results against the reference on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mamba_pretrain.ops import official, registry
from mamba_pretrain.ops.causal_conv1d import causal_conv1d
from mamba_pretrain.ops.registry import Request
from mamba_pretrain.ops.rms_norm import gated_rms_norm, rms_norm
from mamba_pretrain.ops.selective_scan import selective_scan
from mamba_pretrain.ops.ssd_scan import ssd_scan


@pytest.fixture
def installed(monkeypatch):
    """As if the packages could be imported."""
    monkeypatch.setattr(official, "missing", lambda module: None)


def fake(*shape: int, device: str = "cuda", dtype: torch.dtype = torch.bfloat16, grad: bool = False) -> Tensor:
    with FakeTensorMode():
        return torch.empty(shape, device=device, dtype=dtype, requires_grad=grad)


def scan_request(length: int = 8, batch: int = 2, state: int = 16, **changes: Any) -> Request:
    u = fake(batch, length, 64)
    arguments = {
        "u": u,
        "delta": u,
        "A": fake(64, state, dtype=torch.float32),
        "B": fake(batch, length, state),
        "C": fake(batch, length, state),
    }
    arguments |= {"D": None, "z": None, "delta_bias": None, "seq_idx": None, "initial_state": None, "return_final_state": False}
    return Request(arguments | changes)


def ssd_request(length: int = 8, batch: int = 2, heads: int = 4, width: int = 64, **changes: Any) -> Request:
    x, shared = fake(batch, length, heads, width), fake(batch, length, 1, 128)
    arguments = {"x": x, "dt": fake(batch, length, heads), "A": fake(heads, dtype=torch.float32), "B": shared, "C": shared}
    arguments |= {"seq_idx": None, "initial_state": None, "return_final_state": False, "chunk_size": 256, "dt_limit": (0.0, float("inf"))}
    return Request(arguments | changes)


def test_selective_scan_serves_plain_sequences(installed):
    assert official.selective_scan_unsupported(scan_request()) is None
    assert official.selective_scan_unsupported(scan_request(return_final_state=True)) is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"seq_idx": fake(2, 8, dtype=torch.int32)}, "no document boundaries"),
        ({"initial_state": fake(2, 64, 16, dtype=torch.float32)}, "cannot start from a state"),
        ({"u": fake(2, 8, 64, grad=True), "return_final_state": True}, "carries no gradient"),
        ({"state": 257}, "at most 256 states"),
        ({"u": fake(2, 8, 64, dtype=torch.float64)}, "not torch.float64"),
        ({"u": fake(2, 8, 64, device="cpu")}, "needs a CUDA device, not cpu"),
        ({"length": 2**20, "batch": 32}, "32-bit offsets would overflow: u spans 2147483648"),
        ({"batch": 2**17, "state": 256}, "states spans"),
    ],
)
def test_selective_scan_says_why_not(installed, changes, reason):
    assert reason in official.selective_scan_unsupported(scan_request(**changes))


def test_ssd_scan_serves_boundaries_and_states(installed):
    request = ssd_request(
        seq_idx=fake(2, 8, dtype=torch.int32), initial_state=fake(2, 4, 64, 128, dtype=torch.float32), return_final_state=True
    )
    assert official.ssd_scan_unsupported(request) is None


def test_ssd_scan_counts_the_reach_of_views(installed):
    length, width = 61_000, 36_000  # of the projection that x, B and C are cut from
    with FakeTensorMode():
        x = torch.empty_strided((1, length, 4, 64), (length * width, width, 64, 1), device="cuda", dtype=torch.bfloat16)
        shared = torch.empty_strided((1, length, 1, 128), (length * width, width, 128, 1), device="cuda", dtype=torch.bfloat16)
    why = official.ssd_scan_unsupported(ssd_request(length=length, batch=1, x=x, B=shared, C=shared))
    assert "x spans" in why
    assert "states spans" in official.ssd_scan_unsupported(ssd_request(length=65_536, batch=8, heads=64, chunk_size=16, width=32))


@pytest.mark.parametrize(("channels", "taps", "reason"), [(64, 5, "2 to 4 taps"), (60, 4, "multiples of 8"), (64, 4, None)])
def test_causal_conv1d(installed, channels, taps, reason):
    found = official.causal_conv1d_unsupported(Request({"x": fake(2, 8, channels), "weight": fake(channels, taps)}))
    assert found is None if reason is None else reason in found


def test_norms_are_bounded(installed):
    assert official.rms_norm_unsupported(Request({"x": fake(2, 8, 4096)})) is None
    assert "64 KB" in official.rms_norm_unsupported(Request({"x": fake(2, 8, 40_000)}))
    assert official.gated_rms_norm_unsupported(Request({"x": fake(2, 8, 40_000), "group_size": 1000})) is None
    assert "x spans" in official.rms_norm_unsupported(Request({"x": fake(2**20, 2048)}))


@pytest.mark.parametrize(("before", "after"), [(None, "1"), ("0", "0")])
def test_tuned_choices_are_kept_unless_the_user_objects(before, after):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_CACHE_AUTOTUNING"} | (
        {} if before is None else {"TRITON_CACHE_AUTOTUNING": before}
    )
    code = "import os, mamba_pretrain.ops.official; print(os.environ['TRITON_CACHE_AUTOTUNING'])"
    assert subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True).stdout.strip() == after


def test_a_package_that_is_not_there_is_named():
    assert "no_such_kernels cannot be imported" in official.missing("no_such_kernels")


def test_views_are_copied_only_if_misaligned():
    wide = torch.randn(2, 8, 48)
    assert official.aligned(wide[..., 16:32]).data_ptr() == wide[..., 16:32].data_ptr()
    assert official.aligned(wide[..., 3:19]).is_contiguous()
    assert official.aligned(torch.randn(2, 8, 20)[..., :16]).is_contiguous()


# -- against the reference, on a GPU ----------------------------------------------------------------------------------------------------------


def outputs_and_gradients(op: Any, name: str, tensors: dict[str, Tensor | None], options: dict[str, Any]) -> list[Tensor]:
    """Outputs, and gradients by every tensor, through one implementation."""
    torch.manual_seed(1)
    leaves = {k: None if t is None else t.detach().clone().requires_grad_() for k, t in tensors.items()}
    with registry.using(**{op.__name__: name}):
        found = op(**leaves, **options)
    found = found if isinstance(found, tuple) else (found,)
    upstream = [torch.randn(t.shape, device=t.device).to(t.dtype) for t in found]
    differentiable = [(t, g) for t, g in zip(found, upstream, strict=True) if t.requires_grad]
    present = [t for t in leaves.values() if t is not None]
    gradients = torch.autograd.grad([t for t, _ in differentiable], present, [g for _, g in differentiable])
    return [*found, *gradients]


def assert_agrees(op: Any, name: str, tensors: dict[str, Tensor | None], dtype: torch.dtype, **options: Any) -> None:
    """The named implementation equals the reference (which gets the same rounded numbers) within the dtype's rounding."""
    tolerance = 2e-3 if dtype == torch.float32 else 3e-2
    names = (
        ["y", "final"][: 1 + bool(options.get("return_final_state"))]
        if op is not rms_norm
        else ["y", "residual"][: 1 + ("residual" in tensors)]
    )
    names += [k for k, t in tensors.items() if t is not None]
    found, expected = (outputs_and_gradients(op, n, tensors, options) for n in (name, "reference"))
    for label, a, b in zip(names, found, expected, strict=True):
        error = ((a.double() - b.double()).abs().max() / (b.double().abs().max() + 1e-30)).item()
        assert error < tolerance, f"{label}: {error:.1e}"


def gpu(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device="cuda").to(dtype)


def documents(batch: int, length: int) -> Tensor:
    """Random boundaries; numbers repeat, so that comparing them by value would join documents."""
    begins = torch.rand(batch, length, device="cuda") < 0.05
    return (begins.cumsum(1) % 2 + 5).int()


DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 3, 64, 257, 2049])
@pytest.mark.parametrize("optional", [True, False])
def test_selective_scan_on_gpu(dtype, length, optional):
    torch.manual_seed(0)
    b, d, n = 2, 72, 16
    tensors = {
        "u": gpu(b, length, d, dtype=dtype),
        "delta": (gpu(b, length, d) - 3).to(dtype),
        "A": -16 * torch.rand(d, n, device="cuda"),
        "B": gpu(b, length, n, dtype=dtype),
        "C": gpu(b, length, n, dtype=dtype),
        "D": gpu(d) if optional else None,
        "z": gpu(b, length, d, dtype=dtype) if optional else None,
        "delta_bias": gpu(d) if optional else None,
    }
    assert_agrees(selective_scan, "mamba_ssm", tensors, dtype)
    with torch.no_grad(), registry.using(selective_scan="mamba_ssm"):
        final = selective_scan(**tensors, return_final_state=True)[1]
    with torch.no_grad(), registry.using(selective_scan="reference"):
        expected = selective_scan(**tensors, return_final_state=True)[1]
    torch.testing.assert_close(final, expected, rtol=2e-3, atol=2e-3 * expected.abs().max().item())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 5, 256, 300])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("states", [False, True])
def test_ssd_scan_on_gpu(dtype, length, packed, states):
    torch.manual_seed(0)
    b, h, p, g, n = 2, 4, 64, 2, 64
    tensors = {
        "x": gpu(b, length, h, p, dtype=dtype),
        "dt": (gpu(b, length, h) - 3).to(dtype),
        "A": -1 - 15 * torch.rand(h, device="cuda"),
        "B": gpu(b, length, g, n, dtype=dtype),
        "C": gpu(b, length, g, n, dtype=dtype),
        "D": gpu(h),
        "dt_bias": gpu(h),
        "initial_state": gpu(b, h, p, n) if states else None,
    }
    seq_idx = documents(b, length) if packed else None
    # fp32 too: its kernels multiply in TF32 at best.
    assert_agrees(ssd_scan, "mamba_ssm", tensors, torch.bfloat16, seq_idx=seq_idx, return_final_state=states, dt_limit=(0.001, 2.0))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 2, 3, 65, 1025])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("states", [False, True])
@pytest.mark.parametrize("taps", [2, 3, 4])
def test_causal_conv1d_on_gpu(dtype, length, packed, states, taps):
    torch.manual_seed(0)
    tensors = {
        "x": gpu(2, length, 136, dtype=dtype),
        "weight": gpu(136, taps),
        "bias": gpu(136),
        "initial_state": gpu(2, taps - 1, 136, dtype=dtype) if states else None,
    }
    seq_idx = documents(2, length) if packed else None
    assert_agrees(causal_conv1d, "causal_conv1d", tensors, dtype, seq_idx=seq_idx, return_final_state=states)


@pytest.mark.gpu
@pytest.mark.parametrize("offset", [0, 3, 8])
def test_causal_conv1d_of_a_view_on_gpu(offset):
    torch.manual_seed(0)
    wide, weight, bias = gpu(2, 50, 200, dtype=torch.bfloat16), gpu(64, 4), gpu(64)

    def run(name: str) -> list[Tensor]:
        leaf = wide.clone().requires_grad_()
        with registry.using(causal_conv1d=name):
            y = causal_conv1d(leaf[..., offset : offset + 64], weight, bias)
        return [y, *torch.autograd.grad(y, leaf, torch.ones_like(y))]

    for a, b in zip(run("causal_conv1d"), run("reference"), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [8, 100, 2560])
def test_norms_on_gpu(dtype, channels):
    torch.manual_seed(0)
    x, weight, residual = gpu(2, 37, channels, dtype=dtype), gpu(channels), gpu(2, 37, channels)
    assert_agrees(rms_norm, "mamba_ssm", {"x": x, "weight": weight}, dtype, eps=1e-5)
    assert_agrees(rms_norm, "mamba_ssm", {"x": x, "weight": weight, "residual": residual}, dtype, eps=1e-5)
    gated = {"x": x, "z": gpu(2, 37, channels, dtype=dtype), "weight": weight}
    assert_agrees(gated_rms_norm, "mamba_ssm", gated, dtype, eps=1e-5)
    assert_agrees(gated_rms_norm, "mamba_ssm", gated, dtype, eps=1e-5, group_size=channels // 4)
