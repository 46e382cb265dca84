"""Compiling kernels without a GPU, and the folder that keeps them."""

from __future__ import annotations

import importlib
import itertools
import logging
import subprocess
import sys

import pytest
import torch

from data_tools.errors import UserError
from mamba_pretrain.ops import cuda_scan_kernels as kernels
from mamba_pretrain.ops import nvrtc
from mamba_pretrain.ops.kernel_cache import VARIABLE

pytestmark = pytest.mark.skipif(nvrtc.unavailable() is not None, reason=f"{nvrtc.unavailable()}")

ARCHITECTURES = ["sm_80", "sm_90", "sm_100", "sm_120"]
USUAL = {
    "SCALAR_TYPE": 1,
    "STATES": 16,
    "LANE_CHANNELS": 2,
    "GATE_ROW": 2,
    "TWIST_CHANNELS": 4,
    "HAS_Z": 1,
    "HAS_SEQ": 1,
    "VECTOR_IO": 1,
    "VECTOR_BC": 1,
    "WARPS": 4,
    "MIN_BLOCKS": 1,
    "POLYNOMIAL_EVERY": 0,
    "REVERSE": 0,
    "MOST_SHARED": 227 * 1024,
    "TAPS": 4,
    "CHANNELS": 4,
    "CHUNK_STEPS": 64,
    "AHEAD": 4,
    "SILU": 1,
    "COLUMNS": 50304,
    "GRADIENT": 1,
}
SMALL = "scan_join.cu"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty cache."""
    monkeypatch.setenv(VARIABLE, str(tmp_path / "kernels"))
    return tmp_path / "kernels"


@pytest.fixture
def no_compiler(monkeypatch):
    """Fails when something is compiled."""

    def refuse(*arguments):
        raise AssertionError("compiled again")

    return lambda: monkeypatch.setattr(nvrtc, "_compile", refuse)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("file", sorted(p.name for p in nvrtc.SOURCES.glob("*.cu")))
def test_every_source_compiles_for_every_architecture(file, arch):
    own = {"scan_backward.cu": {"LANE_CHANNELS": 4}, "scan_carry.cu": {"LANE_CHANNELS": 4}, "scan_forward.cu": {"POLYNOMIAL_EVERY": 8}}
    macros = {**USUAL, **own.get(file, {})}
    assert nvrtc.cubin(file, macros, arch).startswith(b"\x7fELF")


def tuned_shapes():
    """Every entry of the scan's tables with every number of states that it serves: what its kernel is compiled with."""
    for table, dtypes in ((kernels.HOPPER, (torch.bfloat16,)), (kernels.PORTABLE, (torch.float32, torch.bfloat16))):
        for (name, tuned), dtype, states in itertools.product(table.items(), dtypes, kernels.STATES):
            for entry in tuned:
                channels = min(entry.lane_channels, 64 // states)
                for warps in entry.warps if states <= entry.most_states else ():
                    blocks = max(1, entry.resident // warps)
                    limit = kernels.most_shared(blocks, table is kernels.HOPPER)
                    shape = {
                        "LANE_CHANNELS": channels,
                        "TWIST_CHANNELS": channels,
                        "WARPS": warps,
                        "MIN_BLOCKS": blocks,
                        "MOST_SHARED": limit,
                    }
                    yield name, {**USUAL, **shape, "STATES": states, "SCALAR_TYPE": kernels.SCALAR_TYPES[dtype], "REVERSE": 1}


def test_blocks_of_every_tuned_shape_fit_into_shared_memory():
    """The sources assert it; the compiler's front end is enough to hear them."""
    bindings = importlib.import_module("cuda.bindings.nvrtc")
    shapes = list(tuned_shapes())
    assert len(shapes) > 30
    for name, macros in shapes:
        options = [*nvrtc.OPTIONS, "--gpu-architecture=sm_80", "--fdevice-syntax-only", *(f"-D{k}={v}" for k, v in macros.items())]
        source = (nvrtc.SOURCES / f"{name}.cu").read_bytes()
        program = nvrtc._call("nvrtc", "nvrtcCreateProgram", source, name.encode(), 0, [], [])
        (status,) = bindings.nvrtcCompileProgram(program, len(options), [o.encode() for o in options])
        text = b" " * nvrtc._call("nvrtc", "nvrtcGetProgramLogSize", program)
        nvrtc._call("nvrtc", "nvrtcGetProgramLog", program, text)
        bindings.nvrtcDestroyProgram(program)
        assert status == bindings.nvrtcResult.NVRTC_SUCCESS, (name, macros, text.decode(errors="replace")[:600])


@pytest.mark.slow
@pytest.mark.parametrize("taps", [1, 2, 8])
@pytest.mark.parametrize("scalar_type", [0, 1, 2])
@pytest.mark.parametrize("file", ["conv_forward.cu", "conv_backward.cu"])
def test_every_convolution_compiles(file, scalar_type, taps):
    assert nvrtc.cubin(file, {**USUAL, "SCALAR_TYPE": scalar_type, "TAPS": taps, "CHANNELS": 1, "HAS_SEQ": 0, "SILU": 0}, "sm_90")


@pytest.mark.slow
@pytest.mark.parametrize("states", [8, 16, 32, 64])
@pytest.mark.parametrize("scalar_type", [0, 1, 2])
@pytest.mark.parametrize("given", [0, 1])
@pytest.mark.parametrize("file", ["scan_forward.cu", "scan_carry.cu", "scan_backward.cu"])
def test_every_specialisation_compiles(file, states, scalar_type, given):
    channels = min(4, 64 // states)
    macros = {**USUAL, **dict.fromkeys(("HAS_Z", "HAS_SEQ", "VECTOR_IO", "VECTOR_BC", "REVERSE"), given)}
    macros |= {"STATES": states, "SCALAR_TYPE": scalar_type, "WARPS": 2, "LANE_CHANNELS": channels, "TWIST_CHANNELS": channels}
    assert nvrtc.cubin(file, macros, "sm_90")


def test_a_second_call_reads_the_cache(folder, no_compiler):
    code = nvrtc.cubin(SMALL, USUAL, "sm_90")
    no_compiler()
    assert nvrtc.cubin(SMALL, USUAL, "sm_90") == code
    assert len(list(folder.iterdir())) == 1


def test_another_architecture_macro_or_source_is_another_entry(folder, tmp_path, monkeypatch):
    nvrtc.cubin(SMALL, USUAL, "sm_90")
    nvrtc.cubin(SMALL, USUAL, "sm_80")
    nvrtc.cubin(SMALL, {**USUAL, "STATES": 32}, "sm_90")
    sources = tmp_path / "sources"
    sources.mkdir()
    for source in nvrtc.SOURCES.iterdir():
        (sources / source.name).write_text(source.read_text() + ("// changed\n" if source.name == "scan.cuh" else ""))
    monkeypatch.setattr(nvrtc, "SOURCES", sources)
    nvrtc.cubin(SMALL, USUAL, "sm_90")
    assert len(list(folder.iterdir())) == 4


@pytest.mark.parametrize("damage", [b"", b"short", b"\0" * 5000])
def test_a_damaged_entry_is_compiled_again(folder, damage, caplog):
    code = nvrtc.cubin(SMALL, USUAL, "sm_90")
    (entry,) = folder.iterdir()
    entry.write_bytes(damage)
    with caplog.at_level(logging.WARNING):
        assert nvrtc.cubin(SMALL, USUAL, "sm_90") == code
    assert "damaged" in caplog.text
    assert entry.read_bytes()[32:] == code


def test_many_processes_at_once_leave_one_whole_entry(folder, no_compiler):
    script = f"from mamba_pretrain.ops import nvrtc; nvrtc.cubin({SMALL!r}, {USUAL!r}, 'sm_90')"
    running = [subprocess.Popen([sys.executable, "-c", script]) for _ in range(3)]
    assert [process.wait() for process in running] == [0, 0, 0]
    assert len(list(folder.iterdir())) == 1
    no_compiler()
    assert nvrtc.cubin(SMALL, USUAL, "sm_90")


def test_a_folder_that_cannot_be_written_costs_time_only(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "file" / "kernels"))
    with caplog.at_level(logging.WARNING):
        assert nvrtc.cubin(SMALL, USUAL, "sm_90")
    assert VARIABLE in caplog.text


def test_an_error_shows_the_compilers_words():
    with pytest.raises(UserError, match=r"scan_join.cu does not compile for sm_90 .*STATES"):
        nvrtc.cubin(SMALL, {k: v for k, v in USUAL.items() if k != "STATES"}, "sm_90")


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(nvrtc.importlib.util, "find_spec", lambda name: None)
    nvrtc.unavailable.cache_clear()
    assert "cuda-bindings is missing" in nvrtc.unavailable()
    nvrtc.unavailable.cache_clear()
