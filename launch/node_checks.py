"""The single measurements of the health check; each is a function of its own so that it can be tried alone."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

GEMM_SECONDS = 0.3
PROBE_MB = 16


def usable_devices() -> list[Any]:
    """All GPUs of this node, else the CPU."""
    import torch

    if torch.cuda.is_available():
        return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return [torch.device("cpu")]


def gemm_gflops(device: Any, size: int) -> float:
    """Speed of a matrix product (bf16 on a GPU, fp32 on a CPU), the best of several; raises ArithmeticError if the result is wrong.

    The result is verified by Freivalds' method: A(Bx) = (AB)x, exactly, because all entries are small integers.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-2, 3, (size, size), generator=generator, dtype=torch.float32).to(device) for _ in range(2))
    x = torch.randint(-2, 3, (size, 1), generator=generator, dtype=torch.float64).to(device)
    if not torch.equal((a @ b).double() @ x, a.double() @ (b.double() @ x)):
        raise ArithmeticError(f"a matrix product on {device} is wrong")
    if device.type == "cuda":
        a, b = a.bfloat16(), b.bfloat16()
    best, began = float("inf"), time.perf_counter()
    while time.perf_counter() - began < GEMM_SECONDS:
        start = time.perf_counter()
        a @ b
        _synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e9


def memory_error(device: Any, gigabytes: float) -> str | None:
    """Writes a pattern to memory and reads it back; a sentence if a word changed, None if all is well."""
    import torch

    chunk = 1 << 26  # 256 MB of int32
    words = int(gigabytes * 1e9 / 4)
    kept = [torch.arange(min(chunk, words - first), dtype=torch.int32, device=device) for first in range(0, words, chunk)]
    for index, block in enumerate(kept):
        block.bitwise_xor_(0x55AA55AA ^ index)
    for index, block in enumerate(kept):
        expected = torch.arange(len(block), dtype=torch.int32, device=device).bitwise_xor_(0x55AA55AA ^ index)
        if not torch.equal(block, expected):
            return f"memory of {device}: a word read back differs from the word written"
    return None


def disk(folder: Path) -> float:
    """Free GB of a folder's disk; raises OSError if a file cannot be written, forced to disk and read back there."""
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f".health-{os.environ.get('SLURMD_NODENAME', platform.node())}-{os.getpid()}"
    data = os.urandom(1 << 20)
    try:
        with probe.open("wb") as file:
            for _ in range(PROBE_MB):
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
        with probe.open("rb") as file:
            if file.read(len(data)) != data:
                raise OSError(f"a file written to {folder} reads back differently")
    finally:
        probe.unlink(missing_ok=True)
    return shutil.disk_usage(folder).free / 1e9


def clock(shared: Path) -> float:
    """Seconds by which this node's clock is ahead of the shared file system's, which is the same for all nodes."""
    probe = shared / f".clock-{os.environ.get('SLURMD_NODENAME', platform.node())}"
    before = time.time()
    probe.write_text("")
    after = time.time()
    modified = probe.stat().st_mtime
    probe.unlink()
    return (before + after) / 2 - modified


def versions() -> dict[str, Any]:
    """What must be the same on all nodes."""
    import torch

    found: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    if torch.cuda.is_available():
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        query = ["nvidia-smi", "--query-gpu=driver_version,name", "--format=csv,noheader"]
        found["driver"] = " / ".join(sorted(set(subprocess.run(query, capture_output=True, text=True).stdout.strip().splitlines())))
    return found


def round_robin(world: int) -> Iterator[dict[int, int]]:
    """Rounds in which every rank meets every other once: each round maps ranks to partners (the circle method)."""
    players: list[int | None] = [*range(world), *([None] if world % 2 else [])]
    for _ in range(len(players) - 1):
        pairs = {}
        for left, right in zip(players, reversed(players), strict=True):
            if left is not None and right is not None:
                pairs[left] = right
        yield pairs
        players = [players[0], players[-1], *players[1:-1]]


def pair_gbs(rank: int, partner: int, megabytes: int, repeats: int = 3) -> float:
    """GB/s of a message there and back between two ranks, the best of several."""
    import torch
    import torch.distributed as dist

    device = usable_devices()[0]
    message = torch.zeros(megabytes << 18, dtype=torch.float32, device=device)
    best = float("inf")
    for _ in range(repeats + 1):  # the first opens connections
        start = time.perf_counter()
        for sender in (min(rank, partner), max(rank, partner)):
            dist.send(message, partner) if rank == sender else dist.recv(message, partner)
        _synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * message.nbytes / best / 1e9


def all_reduce_gbs(world: int, megabytes: int, repeats: int = 3) -> float:
    """Bus bandwidth of an all-reduce in GB/s (2 (n-1)/n bytes a rank), the best of several."""
    import torch
    import torch.distributed as dist

    device = usable_devices()[0]
    message = torch.zeros(megabytes << 18, dtype=torch.float32, device=device)
    best = float("inf")
    for _ in range(repeats + 1):
        start = time.perf_counter()
        dist.all_reduce(message)
        _synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * (world - 1) / world * message.nbytes / best / 1e9


def _synchronize(device: Any) -> None:
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)
