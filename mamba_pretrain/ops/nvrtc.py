"""CUDA C++ compiled at first use by NVRTC, the compiler library that torch's CUDA wheels bring; no nvcc, no ABI to mismatch.

A kernel is a file of ``cuda_src`` specialised by macros. Its machine code is kept in a folder on local disk
(``MAMBA_PRETRAIN_KERNEL_CACHE``, else ``~/.cache/mamba_pretrain/kernels``) under a name that hashes sources, macros, architecture and
compiler, so that every later process loads it in milliseconds. Any number of processes may start at once: entries appear by rename, and one
that does not match its checksum is compiled again.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib
import importlib.util
import json
import logging
import os
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from data_tools.errors import UserError
from mamba_pretrain.ops.kernel_cache import VARIABLE, cache_folder

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "cuda_src"
OPTIONS = ("--std=c++17", "--ftz=true", "--fmad=true", "--device-as-default-execution-space", f"--include-path={SOURCES}")

Macros = Mapping[str, int]


@functools.cache
def unavailable() -> str | None:
    """Why kernels cannot be compiled here, in words, or None."""
    try:
        found = importlib.util.find_spec("cuda.bindings.nvrtc")
    except ModuleNotFoundError:
        found = None
    if found is None:
        return "the package cuda-bindings is missing (pip install 'mamba-pretrain[kernels]')"
    try:
        compiler_version()
    except Exception as error:  # the bindings raise their own types when the library is missing or does not fit
        return f"NVRTC cannot be loaded ({error}); install nvidia-cuda-nvrtc of the major version of CUDA that torch was built with"
    return None


@functools.cache
def unsupported(device: torch.device) -> str | None:
    """Why kernels cannot run on a CUDA device, in words, or None."""
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "it needs compute capability 8.0 or newer"
    return unavailable()


@functools.cache
def compiler_version() -> tuple[int, int]:
    """Version of NVRTC."""
    return _call("nvrtc", "nvrtcVersion")


def cubin(file: str, macros: Macros, arch: str) -> bytes:
    """Machine code of ``cuda_src/file`` for an architecture such as ``sm_90``, from the cache or compiled and kept there.

    Raises UserError with the compiler's log if the source does not compile for it.
    """
    entry = cache_folder() / f"{Path(file).stem}-{arch}-{_key(file, macros, arch)}.cubin"
    if (code := _read(entry)) is not None:
        return code
    started = time.monotonic()
    code = _compile(file, macros, arch)
    log.info("compiled %s for %s in %.1f s", file, arch, time.monotonic() - started)
    _write(entry, code)
    return code


def _key(file: str, macros: Macros, arch: str) -> str:
    sources = sorted(p for p in SOURCES.iterdir() if p.name == file or p.suffix == ".cuh")
    digest = hashlib.sha256()
    for part in (json.dumps([file, sorted(macros.items()), arch, OPTIONS[:-1], compiler_version()]), *(p.read_text() for p in sources)):
        digest.update(hashlib.sha256(part.encode()).digest())
    return digest.hexdigest()[:24]


def _read(entry: Path) -> bytes | None:
    try:
        content = entry.read_bytes()
    except OSError:
        return None
    checksum, code = content[:32], content[32:]
    if hashlib.sha256(code).digest() == checksum:
        return code
    log.warning("%s is damaged and will be compiled again", entry)
    return None


def _write(entry: Path, code: bytes) -> None:
    """Keeps an entry; without a writable folder every process compiles for itself."""
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=entry.parent, prefix=".", delete=False) as file:
            file.write(hashlib.sha256(code).digest() + code)
        os.replace(file.name, entry)
    except OSError as error:
        log.warning("compiled kernels cannot be kept in %s (%s); set %s to a writable folder", entry.parent, error, VARIABLE)


def _compile(file: str, macros: Macros, arch: str) -> bytes:
    nvrtc = importlib.import_module("cuda.bindings.nvrtc")
    source = (SOURCES / file).read_bytes()
    options = [o.encode() for o in (*OPTIONS, f"--gpu-architecture={arch}", *(f"-D{k}={v}" for k, v in sorted(macros.items())))]
    program = _call("nvrtc", "nvrtcCreateProgram", source, file.encode(), 0, [], [])
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            text = b" " * _call("nvrtc", "nvrtcGetProgramLogSize", program)
            _call("nvrtc", "nvrtcGetProgramLog", program, text)
            raise UserError(f"{file} does not compile for {arch} ({status.name}): {text.decode(errors='replace').strip(chr(0)).strip()}")
        code = b" " * _call("nvrtc", "nvrtcGetCUBINSize", program)
        _call("nvrtc", "nvrtcGetCUBIN", program, code)
        return code
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _call(library: str, function: str, *arguments: Any) -> Any:
    """Calls a function of the bindings (``driver`` or ``nvrtc``) and returns its results without the status, which must be success."""
    status, *results = getattr(importlib.import_module(f"cuda.bindings.{library}"), function)(*arguments)
    if int(status) != 0:
        raise RuntimeError(f"{function}: {status.name}")
    return results[0] if len(results) == 1 else tuple(results)


@functools.cache
def architecture(device: int) -> str:
    """The architecture to compile for: the device's own, else the newest of its major version that the compiler knows."""
    major, minor = torch.cuda.get_device_capability(device)
    known = [int(a) for a in _call("nvrtc", "nvrtcGetSupportedArchs")]
    fitting = [a for a in known if a // 10 == major and a % 10 <= minor]
    if not fitting:
        raise UserError(f"NVRTC {compiler_version()} does not know compute capability {major}.{minor}; install a newer nvidia-cuda-nvrtc")
    return f"sm_{max(fitting)}"


_Pointer = ctypes.c_char_p * 1


def _current_stream(device: int) -> int:
    """The handle of torch's current stream, as Triton and torch's own compiler ask for it: ``torch.cuda.current_stream`` makes an object first."""
    return torch._C._cuda_getCurrentRawStream(device)


@dataclass
class Kernel:
    """A loaded kernel. Launches go to torch's current stream of its device, which must be the current one."""

    function: Any
    block: int
    shared_bytes: int
    device: int
    _launch: Any = field(repr=False)

    def __call__(self, grid: tuple[int, int, int], params: bytes) -> None:
        """Launches with one struct as the argument."""
        arguments = _Pointer(params)
        stream = _current_stream(self.device)
        (status,) = self._launch(self.function, *grid, self.block, 1, 1, self.shared_bytes, stream, ctypes.addressof(arguments), 0)
        if int(status) != 0:
            raise RuntimeError(
                f"kernel launch failed: {status.name} (grid {grid}, block {self.block}, {self.shared_bytes} bytes of shared memory)"
            )


_kernels: dict[tuple[Any, ...], Kernel] = {}


def kernel(file: str, macros: Macros, block: int, device: int) -> Kernel:
    """The kernel of ``cuda_src/file`` (named like the file) for a device, compiled and loaded at first use.

    A source that needs dynamic shared memory says how much in a global ``NAME_shared_bytes``.
    """
    key = (file, tuple(sorted(macros.items())), device)
    if key not in _kernels:
        with torch.cuda.device(device):
            torch.cuda.current_stream().synchronize()  # makes the device's primary context current
            _kernels[key] = _load(file, macros, block, device)
    return _kernels[key]


def _load(file: str, macros: Macros, block: int, device: int) -> Kernel:
    driver = importlib.import_module("cuda.bindings.driver")
    name = Path(file).stem
    module = _call("driver", "cuModuleLoadData", cubin(file, macros, architecture(device)))
    function = _call("driver", "cuModuleGetFunction", module, name.encode())
    shared = ctypes.c_int(0)
    status, address, size = driver.cuModuleGetGlobal(module, f"{name}_shared_bytes".encode())
    if int(status) == 0:
        driver.cuMemcpyDtoH(ctypes.addressof(shared), address, size)
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _call("driver", "cuFuncSetAttribute", function, attribute, shared.value)
    return Kernel(function, block, shared.value, device, driver.cuLaunchKernel)
