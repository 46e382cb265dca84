"""What the machine can do: matmul and memory ceilings, collectives, disk, shared memory, limits."""

from __future__ import annotations

import os
import resource
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from mamba_pretrain.doctor.check import Check, green, grey, red
from mamba_pretrain.monitor.text import gigabytes
from mamba_pretrain.monitor.throughput import peak_flops

SLOW = 0.5  # of a GPU's data-sheet peak: a healthy H100 reaches 0.8 in a large bf16 matmul
PROBE_BYTES = 64 << 20
LEAST_FREE, LEAST_SHARED_MEMORY, LEAST_FILES = 5e9, 1e9, 1024
SLOW_DISK = 50e6
PROBE = ".doctor-probe"


def ceilings() -> Iterator[Check]:
    """bf16 matmul and copy speed of the device."""
    import torch

    cuda = torch.cuda.is_available()
    device, size = ("cuda", 8192) if cuda else ("cpu", 1024)
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    rate = 2 * size**3 / _seconds(lambda: a @ b, cuda)
    source = torch.empty((256 << 20) if cuda else (16 << 20), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = 2 * source.numel() / _seconds(lambda: target.copy_(source), cuda)
    text = f"bf16 matmul {rate / 1e12:.3g} TFLOP/s, copy {copy / 1e9:,.0f} GB/s (read + written)"
    peak = peak_flops(torch.cuda.get_device_name()) if cuda else None
    if peak and rate < SLOW * peak:
        mend = "look for throttling and other processes: nvidia-smi -q -d PERFORMANCE,CLOCK,TEMPERATURE"
        yield red("speed of the device", f"{text}; that is {rate / peak:.0%} of the data sheet's peak", mend)
    else:
        yield green("speed of the device", text)


def _seconds(call: Callable[[], object], cuda: bool) -> float:
    """Best of a few timed calls after two warm-ups."""
    import torch

    times = []
    for i in range(7):
        if cuda:
            torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        if cuda:
            torch.cuda.synchronize()
        if i >= 2:
            times.append(time.perf_counter() - began)
    return min(times)


# Run by two processes: sums a vector over all ranks and prints what a ring sends per second.
ALL_REDUCE = """
import os, sys, time, torch, torch.distributed as dist
rank, backend = int(os.environ["RANK"]), sys.argv[1]
if backend == "nccl":
    torch.cuda.set_device(rank)
dist.init_process_group(backend)
world = dist.get_world_size()
device = f"cuda:{rank}" if backend == "nccl" else "cpu"
x = torch.full((int(sys.argv[2]),), float(rank + 1), device=device)
for i in range(4):
    y = x.clone()
    if device != "cpu":
        torch.cuda.synchronize()
    began = time.perf_counter()
    dist.all_reduce(y)
    if device != "cpu":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
assert bool((y == world * (world + 1) / 2).all()), "wrong sum"
if rank == 0:
    print(2 * (world - 1) / world * 4 * y.numel() / seconds)
dist.destroy_process_group()
"""


def all_reduce() -> Iterator[Check]:
    """A sum over processes of this node: NCCL over its GPUs, gloo where there are fewer than two."""
    import torch

    gpus = torch.cuda.device_count()
    backend, world, elements = ("nccl", gpus, 64 << 20) if gpus > 1 else ("gloo", 2, 1 << 20)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    base = {**os.environ, "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", ALL_REDUCE, backend, str(elements)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    ranks = [subprocess.Popen(command, env={**base, "RANK": str(r), "LOCAL_RANK": str(r)}, **pipes) for r in range(world)]  # type: ignore[call-overload]
    name = f"all-reduce ({backend}, {world} processes)"
    mend = "see NCCL_DEBUG=INFO; check NCCL_* and GLOO_SOCKET_IFNAME, and that processes of this node may talk over the loopback interface"
    try:
        outputs = [process.communicate(timeout=90) for process in ranks]
    except subprocess.TimeoutExpired:
        for process in ranks:
            process.kill()
        yield red(name, "did not finish within 90 s", mend)
        return
    if any(process.returncode for process in ranks):
        error = next(err for process, (_, err) in zip(ranks, outputs, strict=True) if process.returncode)
        yield red(name, f"failed: {' '.join(error.split())[-200:]}", mend)
    else:
        yield green(name, f"right sum, {float(outputs[0][0]) / 1e9:.2f} GB/s")


def disk(folder: Path) -> Iterator[Check]:
    """Whether the run folder can be written, how fast, and how much is free."""
    name = f"disk of {folder}"
    probe = folder / PROBE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write, read = _disk_speed(probe)
    except OSError as error:
        yield red(name, f"cannot be written: {error.strerror or error}", "free space, mend permissions or quota, or choose another run_dir")
        return
    free = shutil.disk_usage(folder).free
    text = f"write {write / 1e6:,.0f} MB/s, read {read / 1e6:,.0f} MB/s, {gigabytes(free, 0)} free"
    if free < LEAST_FREE:
        yield red(
            name, text, "free space or choose another run_dir: a checkpoint takes 12 bytes per parameter and keep_last + 1 of them exist"
        )
    elif write < SLOW_DISK:
        yield red(name, f"{text}; that is slow", "choose a parallel file system for run_dir; checkpoint.async_save=true hides some of it")
    else:
        yield green(name, text)


def _disk_speed(probe: Path) -> tuple[float, float]:
    data = os.urandom(1 << 20)
    try:
        began = time.perf_counter()
        with probe.open("wb") as file:
            for _ in range(PROBE_BYTES >> 20):
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
        written = time.perf_counter() - began
        with probe.open("rb") as file:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            began = time.perf_counter()
            while file.read(1 << 20):
                pass
            seconds = time.perf_counter() - began
    finally:
        probe.unlink(missing_ok=True)
    return PROBE_BYTES / written, PROBE_BYTES / seconds


def limits(shared_memory: Path = Path("/dev/shm")) -> Iterator[Check]:
    """Shared memory and open files, which data workers and NCCL run out of."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if files != resource.RLIM_INFINITY and files < LEAST_FILES:
        yield red("open files", f"at most {files}", f"raise the limit: ulimit -n {LEAST_FILES * 64}")
    else:
        yield green("open files", "unlimited" if files == resource.RLIM_INFINITY else f"at most {files:,}")
    if not shared_memory.is_dir():
        yield grey("shared memory", f"no {shared_memory} on this system")
        return
    total = shutil.disk_usage(shared_memory).total
    if total < LEAST_SHARED_MEMORY:
        yield red("shared memory", f"{gigabytes(total, 2)} in {shared_memory}", "start the container with --shm-size=16g or --ipc=host")
    else:
        yield green("shared memory", gigabytes(total))
