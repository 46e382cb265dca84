"""Runs the kernels' own source on a CPU: lanes are coroutines, shared memory begins as NaN, asynchronous copies arrive when waited for.

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

from mamba_pretrain.ops import nvrtc

EMULATION = Path(__file__).parent
PARAMS = {
    "scan_forward": "ForwardParams",
    "scan_backward": "BackwardParams",
    "scan_carry": "CarryParams",
    "scan_join": "JoinParams",
    "scan_reduce": "ReduceParams",
    "conv_forward": "ConvParams",
    "conv_backward": "ConvParams",
    "conv_reduce": "ConvReduceParams",
}


@dataclass
class EmulatedKernel:
    """Stands for nvrtc.Kernel."""

    run: ctypes._CFuncPtr  # type: ignore[name-defined]
    block: int

    def __call__(self, grid: tuple[int, int, int], params: bytes) -> None:
        self.run(params, *grid, self.block)


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
def emulated_kernels(folder, monkeypatch):
    """nvrtc.kernel gives emulated kernels."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")

    def kernel(file: str, macros: dict[str, int], block: int, device: int) -> EmulatedKernel:
        name = Path(file).stem
        return EmulatedKernel(library(folder, name, tuple(sorted(macros.items()))).run, block)

    monkeypatch.setattr(nvrtc, "kernel", kernel)


@pytest.fixture(scope="session")
def make_case():
    """Makes a case as in the table of tests/ops/conftest.py."""

    def case(**changes):
        usual = {"length": 53, "delta": (-2.0, 1.0), "decay": (0.5, 16.0), "starts": "random"}
        return SimpleNamespace(**{**usual, "initial": True, "final": True, "optional": True, "options": {}, **changes})

    return case
