"""The kernels' own source on a CPU: lanes are coroutines, shared memory begins as NaN, asynchronous copies arrive when waited for.

Slow, but it sees what a compiler does not: a missing barrier's or copy's wait, a wrong index, an element nobody wrote.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mamba_pretrain.ops import cuda_scan_kernels as kernels
from mamba_pretrain.ops import nvrtc, registry

EMULATION = Path(__file__).parent / "cuda_emulation"
PARAMS = {
    "scan_forward": "ForwardParams",
    "scan_backward": "BackwardParams",
    "scan_carry": "CarryParams",
    "scan_join": "JoinParams",
    "scan_reduce": "ReduceParams",
}


def case(**changes):
    """A case as in the table of conftest.py."""
    usual = {"length": 53, "delta": (-2.0, 1.0), "decay": (0.5, 16.0), "starts": "random", "initial": True, "final": True, "optional": True}
    return SimpleNamespace(**{**usual, "options": {}, **changes})


pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


@dataclass
class EmulatedKernel:
    """Stands for nvrtc.Kernel."""

    run: ctypes._CFuncPtr  # type: ignore[name-defined]
    block: int

    def __call__(self, grid: tuple[int, int, int], params: ctypes.Structure) -> None:
        self.run(ctypes.byref(params), *grid, self.block)


@functools.cache
def library(folder: Path, name: str, macros: tuple[tuple[str, int], ...]) -> ctypes.CDLL:
    """The kernel compiled for the CPU."""
    path = folder / f"{name}-{hashlib.sha256(repr(macros).encode()).hexdigest()[:16]}.so"
    definitions = [f"-D{k}={v}" for k, v in macros]
    definitions += [f'-DSOURCE="{nvrtc.SOURCES / name}.cu"', f"-DKERNEL={name}", f"-DPARAMS={PARAMS[name]}"]
    options = ["-std=c++20", "-O1", "-fno-strict-aliasing", "-w", "-shared", "-fPIC", "-fvisibility=hidden", "-fno-gnu-unique"]
    options += [f"-I{EMULATION}", f"-I{nvrtc.SOURCES}"]
    subprocess.run(["g++", *options, *definitions, "-o", path, EMULATION / "run.cpp"], check=True)
    return ctypes.CDLL(str(path))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where compiled kernels lie."""
    return tmp_path_factory.mktemp("emulated")


@pytest.fixture
def emulated(folder, monkeypatch):
    """Registers the implementation ``emulated``; calling the fixture sets how kernels run."""

    def kernel(file: str, macros: dict[str, int], block: int, device: int) -> EmulatedKernel:
        name = Path(file).stem
        return EmulatedKernel(library(folder, name, tuple(sorted(macros.items()))).run, block)

    class Scan(torch.autograd.Function):
        @staticmethod
        def forward(ctx, u, delta, A, B, C, D, z, delta_bias, seq_idx, initial):
            ctx.ops = kernels.Operands(*(None if t is None else t.detach() for t in (u, delta, A, B, C, D, z, delta_bias, seq_idx)))
            y, final, ctx.checkpoints = kernels.forward(ctx.ops, initial, save=True)
            ctx.present = [t is not None for t in (u, delta, A, B, C, D, z, delta_bias, initial)]
            return y, final

        @staticmethod
        def backward(ctx, dy, dfinal):
            found = kernels.backward(ctx.ops, dy.contiguous(), dfinal.contiguous(), ctx.checkpoints).in_order()
            *grads, dinitial = (g if there else None for g, there in zip(found, ctx.present, strict=True))
            return *grads, None, dinitial

    def scan(u, delta, A, B, C, D, z, delta_bias, seq_idx, initial_state, return_final_state):
        y, final = Scan.apply(u, delta, A, B, C, D, z, delta_bias, seq_idx, initial_state)
        return (y, final) if return_final_state else y

    monkeypatch.setattr(nvrtc, "kernel", kernel)
    named = {**registry._implementations["selective_scan"]}
    monkeypatch.setitem(registry._implementations, "selective_scan", named)
    registry.register("selective_scan", "emulated", priority=-1)(scan)

    def set_shapes(segments: int = 1, lane_channels: int = 4, warps: int = 2) -> None:
        def shape(kernel, device, dtype, batch, length, channels, states):
            per_quad = min(lane_channels if kernel == "scan_backward" else 2, lane_channels, 64 // states)
            return kernels.Shape(per_quad, warps, 1, 0, -(-channels // (warps * 8 * per_quad)), segments)

        monkeypatch.setattr(kernels, "shape", shape)
        kernels._kernel.cache_clear()
        kernels._plain_kernel.cache_clear()

    yield set_shapes
    kernels._kernel.cache_clear()
    kernels._plain_kernel.cache_clear()


@pytest.mark.parametrize(
    "this",
    [
        case(),
        case(starts=(15,), length=16),
        case(starts="every", length=33),
        case(decay=(1e-8, 1e4), delta=(0.0, 4.0)),
        case(optional=False, initial=False, final=False, starts="none"),
    ],
    ids=["usual", "one-tile", "starts-everywhere", "decays-of-all-sizes", "only-what-is-required"],
)
def test_some_cases(this, check_selective_scan, emulated):
    emulated()
    check_selective_scan(this, "emulated", dtype=torch.bfloat16, batch=1, channels=40, state=16)


def test_segments(check_selective_scan, emulated):
    emulated(segments=3)
    check_selective_scan(case(length=101), "emulated", dtype=torch.bfloat16, batch=1, channels=40, state=16)


@pytest.mark.slow
def test_all_cases(short_selective_scan_case, check_selective_scan, emulated):
    emulated()
    check_selective_scan(short_selective_scan_case, "emulated", dtype=torch.bfloat16, channels=72, state=16)


@pytest.mark.slow
def test_all_cases_in_segments(short_selective_scan_case, check_selective_scan, emulated):
    emulated(segments=3)
    check_selective_scan(short_selective_scan_case, "emulated", dtype=torch.bfloat16, batch=1, channels=40, state=16)


@pytest.mark.slow
@pytest.mark.parametrize("state", kernels.STATES)
@pytest.mark.parametrize(("channels", "dtype"), [(24, torch.float32), (37, torch.float16)], ids=str)
def test_state_sizes(check_selective_scan, state, channels, dtype, emulated):
    emulated()
    check_selective_scan(case(), "emulated", dtype=dtype, channels=channels, state=state)


@pytest.mark.slow
def test_two_channels_a_quad(check_selective_scan, emulated):
    emulated(lane_channels=2, warps=3)
    check_selective_scan(case(), "emulated", dtype=torch.bfloat16, channels=56, state=16)


def test_results_are_what_compilers_are_told(emulated):
    """Shapes and dtypes of the fake kernels, which torch.compile and the FLOP counter use."""
    emulated()
    arguments = {
        "u": torch.randn(1, 20, 40, dtype=torch.bfloat16),
        "delta": torch.randn(1, 20, 40, dtype=torch.bfloat16),
        "A": -torch.rand(40, 16),
        "B": torch.randn(1, 20, 16, dtype=torch.bfloat16),
        "C": torch.randn(1, 20, 16, dtype=torch.bfloat16),
        "D": torch.randn(40),
        "z": torch.randn(1, 20, 40, dtype=torch.bfloat16),
        "delta_bias": torch.randn(40),
        "seq_idx": torch.zeros(1, 20, dtype=torch.int32),
    }
    ops = kernels.Operands(**arguments)
    found = kernels.forward(ops, None, save=True)
    gradients = kernels.backward(ops, torch.randn(1, 20, 40).bfloat16(), None, found[2]).in_order()
    meta = [t.to("meta") for t in arguments.values()]
    told = torch.ops.mamba_pretrain.cuda_scan_forward(*meta, None, True)
    told_gradients = torch.ops.mamba_pretrain.cuda_scan_backward(told[0], None, *meta, told[2])
    for real, fake in zip([*found, *gradients], [*told, *told_gradients], strict=True):
        assert (real.shape, real.dtype) == (fake.shape, fake.dtype)
