"""C sources to functions in this process: compiled by the machine's own C compiler at first use.

A CPU has no kernels in torch for scans, and a chain of tensor operations moves many times the memory that a loop needs. The sources in
``c_src`` are compiled for the very machine (``-march=native``) and kept beside the CUDA kernels, under a name that hashes sources, options,
compiler and instruction set: a home folder may be shared by machines of different kinds. Any number of processes may start at once, since a
library appears by rename.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mamba_pretrain.ops.kernel_arguments import adjacent, pointer, rows
from mamba_pretrain.ops.kernel_cache import cache_folder
from mamba_pretrain.ops.registry import Request

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "c_src"
OPTIONS = ("-O3", "-std=gnu11", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi", "-shared", "-fPIC")
# What not every compiler knows, the best first: threads that are torch's own, and this machine's instruction set instead of any of its kind.
EXTRAS = (("-march=native", "-fopenmp"), ("-march=native",), ())
PATIENCE = 120  # seconds for one compilation
TASK_CHANNELS = 128  # as in groups.h


@functools.cache
def compiler() -> str | None:
    """Path of the C compiler: ``$CC``, else cc, gcc or clang."""
    names = [os.environ["CC"]] if os.environ.get("CC") else ["cc", "gcc", "clang"]
    return next((path for path in map(shutil.which, names) if path), None)


def unsupported(request: Request) -> str | None:
    """Why no C kernel can serve a call, in words, or None."""
    if request.device != "cpu":
        return f"it runs on CPUs, not {request.device}"
    if request.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it computes in fp32, not {request.dtype}"
    return "there is nothing to compute" if request.main.numel() == 0 else None


def unavailable(name: str) -> str | None:
    """Why ``c_src/name.c`` cannot be used here, in words, or None."""
    return _unavailable(name)


# torch.compile calls it while it traces instead of tracing through it (torch.compiler.assume_constant_result, which would import the compiler).
unavailable._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _unavailable(name: str) -> str | None:
    if compiler() is None:
        return "there is no C compiler (install gcc or clang, or name one in CC)"
    try:
        library(name)
    except (OSError, subprocess.SubprocessError) as error:
        log.debug("%s: %s", name, error)
        return f"{compiler()} could not build it ({_first_line(error)})"
    return None


@functools.cache
def library(name: str) -> ctypes.CDLL:
    """The compiled ``c_src/name.c``. Raises OSError or SubprocessError if it cannot be compiled or loaded."""
    entry = cache_folder() / f"{name}-{_key(name)}.so"
    if entry.exists():
        try:
            return ctypes.CDLL(str(entry))
        except OSError as error:  # cut short by a full disk or a crash
            log.warning("%s cannot be loaded and is compiled again (%s)", entry, error)
    return _build(name, entry)


def _build(name: str, entry: Path) -> ctypes.CDLL:
    started = time.monotonic()
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.mkdtemp(dir=entry.parent, prefix=".")
    except OSError:  # nowhere to keep it: this process compiles for itself
        folder = tempfile.mkdtemp()
    try:
        made = Path(folder) / entry.name
        _compile(name, made)
        with open(made, "rb") as file:
            os.fsync(file.fileno())
        if Path(folder).parent == entry.parent:
            os.replace(made, entry)
            made = entry
        loaded = ctypes.CDLL(str(made))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    log.info("compiled %s.c in %.1f s", name, time.monotonic() - started)
    return loaded


def _compile(name: str, made: Path) -> None:
    for extras in EXTRAS:
        command = [str(compiler()), *OPTIONS, *extras, "-o", str(made), str(SOURCES / f"{name}.c"), "-lm"]
        result = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=not extras)
        if result.returncode == 0:
            return
        log.warning("%s does not take %s; trying without", compiler(), " ".join(extras))


@functools.cache
def _key(name: str) -> str:
    sources = [*sorted(SOURCES.glob("*.h")), SOURCES / f"{name}.c"]
    digest = hashlib.sha256()
    for part in (*_machine(), *OPTIONS, str(EXTRAS), *(path.read_text() for path in sources)):
        digest.update(hashlib.sha256(part.encode()).digest())
    return digest.hexdigest()[:24]


@functools.cache
def _machine() -> tuple[str, str]:
    """The compiler's version, and what distinguishes the instruction sets of machines that may share a cache."""
    version = subprocess.run([str(compiler()), "--version"], capture_output=True, text=True, timeout=PATIENCE, check=False).stdout
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return version, platform.machine() + platform.processor()
    return version, platform.machine() + next((line for line in lines if line.lower().startswith(("flags", "features"))), "")


def _first_line(error: Exception) -> str:
    text = getattr(error, "stderr", None) or str(error)
    return next((line for line in text.splitlines() if "error" in line), text.strip().partition("\n")[0])


# -- calls --------------------------------------------------------------------------------------------------------------------------------


def channel_groups(x: Tensor) -> int:
    """Tasks that kernels which include groups.h make of one row of ``x`` (batch, length, channels)."""
    return -(-x.shape[2] // TASK_CHANNELS)


def call(
    name: str,
    function: str,
    params: Any,
    tasks: int,
    strided: Mapping[str, Tensor | None],
    whole: Mapping[str, Tensor | None],
    **numbers: float,
) -> None:
    """Calls ``function(&struct, first, last)`` of ``c_src/name.c`` over all tasks, on as many threads as torch uses.

    ``params`` makes the struct. ``strided`` tensors are (batch, length, channels), passed as rows with adjacent channels; of ``whole``
    ones the kernel sees the beginning of a contiguous tensor. Outputs must be so already.
    """
    views = {key: adjacent(t) for key, t in strided.items()}
    held = {key: None if t is None else t.contiguous() for key, t in whole.items()}  # copies live until the call is over
    arguments = params(**{key: rows(t) for key, t in views.items()}, **{key: pointer(t) for key, t in held.items()}, **numbers)
    _run(library(name), function, arguments, tasks)


def _run(loaded: ctypes.CDLL, function: str, arguments: bytes, tasks: int) -> None:
    kernel = getattr(loaded, function)
    where = ctypes.c_char_p(arguments)
    threads = max(1, min(torch.get_num_threads(), tasks))
    if ctypes.c_int.in_dll(loaded, "has_openmp"):
        loaded.run_tasks(kernel, where, ctypes.c_int64(tasks), ctypes.c_int64(threads))
        return
    bounds = [ctypes.c_int64(tasks * i // threads) for i in range(threads + 1)]
    mine, *rest = pairwise(bounds)
    others = [_pool(threads).submit(kernel, where, *part) for part in rest]  # ctypes releases the interpreter's lock
    kernel(where, *mine)
    for other in others:
        other.result()


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="c-kernel")
