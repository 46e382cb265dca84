"""Compiling C kernels, and what happens where that cannot be done."""

from __future__ import annotations

import ctypes
import logging
import subprocess
import sys

import pytest
import torch

from mamba_pretrain.ops import cc, registry
from mamba_pretrain.ops.causal_conv1d import causal_conv1d
from mamba_pretrain.ops.kernel_cache import VARIABLE

pytestmark = pytest.mark.skipif(cc.compiler() is None, reason="there is no C compiler")
NAME = "causal_conv1d"


def forget() -> None:
    for function in (cc.compiler, cc._unavailable, cc.library, cc._key, cc._machine):
        function.cache_clear()


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty cache, and a module that has compiled nothing yet."""
    monkeypatch.setenv(VARIABLE, str(tmp_path / "kernels"))
    forget()
    yield tmp_path / "kernels"
    forget()


def test_a_library_is_compiled_once(folder, monkeypatch):
    cc.library(NAME)
    (entry,) = folder.iterdir()
    assert entry.suffix == ".so"
    cc.library.cache_clear()
    monkeypatch.setattr(cc, "_compile", lambda *arguments: pytest.fail("compiled again"))
    assert cc.library(NAME)[f"{NAME}_forward"]


def test_a_damaged_library_is_compiled_again(folder, caplog):
    entry = folder / f"{NAME}-{cc._key(NAME)}.so"
    entry.parent.mkdir()
    entry.write_bytes(b"half a file")
    assert cc.library(NAME)[f"{NAME}_forward"]
    assert "cannot be loaded and is compiled again" in caplog.text
    assert len(list(folder.iterdir())) == 1


def test_a_folder_that_cannot_be_written_costs_time_only(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv(VARIABLE, str(tmp_path / "file" / "kernels"))
    assert cc.library(NAME)[f"{NAME}_forward"]


def test_many_processes_may_start_at_once(folder):
    code = f"from mamba_pretrain.ops import cc; cc.library({NAME!r})"
    processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert [entry.suffix for entry in folder.iterdir()] == [".so"]


@pytest.mark.parametrize(("unknown", "openmp"), [("-march=native", 0), ("-fopenmp", 0), ("-nothing", 1)])
def test_a_compiler_that_knows_less(unknown, openmp, tmp_path, monkeypatch):
    """Whatever it lacks, the library works, on OpenMP's threads or on Python's."""
    compiler = tmp_path / "old-cc"
    compiler.write_text(f'#!/bin/sh\ncase "$*" in *{unknown}*) exit 1;; esac\nexec {cc.compiler()} "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    forget()
    assert cc.unavailable(NAME) is None
    assert ctypes.c_int.in_dll(cc.library(NAME), "has_openmp").value == openmp
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    torch.manual_seed(0)
    x, weight = torch.randn(3, 50, 300), torch.randn(300, 4)
    with registry.using(causal_conv1d="reference"):
        expected = causal_conv1d(x, weight)
    with registry.using(causal_conv1d="c"):
        torch.testing.assert_close(causal_conv1d(x, weight), expected)


@pytest.mark.parametrize(("compiler", "reason"), [("/nowhere/cc", "there is no C compiler"), ("false", "could not build it")])
def test_without_a_working_compiler_the_reference_serves(compiler, reason, monkeypatch, caplog):
    monkeypatch.setenv("CC", compiler)
    monkeypatch.setattr(registry, "_choices", {})
    forget()
    with caplog.at_level(logging.INFO):
        registry.call(
            "causal_conv1d",
            x=torch.ones(1, 3, 2),
            weight=torch.ones(2, 4),
            bias=None,
            activation=None,
            seq_idx=None,
            initial_state=None,
            return_final_state=False,
        )
    assert "causal_conv1d: reference on cpu" in caplog.text
    assert reason in caplog.text
