"""Runs the kernels' own source on a CPU: lanes are coroutines, shared memory begins as NaN, asynchronous copies arrive when waited for.

Slow, but it sees what a compiler does not: a missing barrier's or copy's wait, a wrong index, an element nobody wrote; and where it is ``watched``,
every pair of accesses that no barrier puts in order (``races.cpp``).
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
    "adamw": "AdamwParams",
    "softmax_gradient": "SoftmaxParams",
}


@dataclass
class EmulatedKernel:
    """Stands for nvrtc.Kernel."""

    library: ctypes.CDLL
    block: int
    watched: bool

    def __call__(self, grid: tuple[int, int, int], params: bytes) -> None:
        self.library.run(params, *grid, self.block)
        if self.watched and (found := self.library.races_found()):
            raise AssertionError(found.decode())


@functools.cache
def library(folder: Path, source: Path, macros: tuple[tuple[str, int], ...], watched: bool) -> ctypes.CDLL:
    """The kernel of a source compiled for the CPU; ``watched``: so that ``races.cpp`` sees what its lanes do with shared memory."""
    name = source.stem
    path = folder / f"{name}-{hashlib.sha256(repr((source, macros, watched)).encode()).hexdigest()[:16]}.so"
    definitions = [f"-D{k}={v}" for k, v in macros]
    shared = f"{name}_shared_bytes"
    definitions += [f'-DSOURCE="{source}"', f"-DKERNEL={name}", f"-DPARAMS={PARAMS[name]}"]
    definitions.append(f"-DSHARED_BYTES={shared if shared in source.read_text() else 0}")
    options = ["-std=c++20", "-O1", "-fno-strict-aliasing", "-w", "-fPIC", "-fvisibility=hidden", "-fno-gnu-unique"]
    options += [f"-I{EMULATION}", f"-I{source.parent}", f"-I{nvrtc.SOURCES}"]
    parts = [EMULATION / "run.cpp"]
    if watched:
        parts = [path.with_suffix(".o"), EMULATION / "races.cpp"]
        subprocess.run(
            ["g++", *options, "-fsanitize=thread", "-DWATCHED", *definitions, "-c", "-o", parts[0], EMULATION / "run.cpp"], check=True
        )
    subprocess.run(["g++", *options, *definitions, "-shared", "-o", path, *parts], check=True)
    loaded = ctypes.CDLL(str(path))
    if watched:
        loaded.races_found.restype = ctypes.c_char_p
    return loaded


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where compiled kernels lie."""
    return tmp_path_factory.mktemp("emulated")


@pytest.fixture
def watched():
    """Whether shared memory is watched; a test's own fixture or parameter says so."""
    return False


@pytest.fixture
def emulated_kernels(folder, watched, monkeypatch):
    """nvrtc.kernel gives emulated kernels."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")

    def kernel(file: str, macros: dict[str, int], block: int, device: int) -> EmulatedKernel:
        return EmulatedKernel(library(folder, nvrtc.SOURCES / file, tuple(sorted(macros.items())), watched), block, watched)

    monkeypatch.setattr(nvrtc, "kernel", kernel)


@pytest.fixture(scope="session")
def make_case():
    """Makes a case as in the table of tests/ops/conftest.py."""

    def case(**changes):
        usual = {"length": 53, "delta": (-2.0, 1.0), "decay": (0.5, 16.0), "starts": "random"}
        return SimpleNamespace(**{**usual, "initial": True, "final": True, "optional": True, "options": {}, **changes})

    return case
