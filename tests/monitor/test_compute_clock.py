"""A rank slowed by two is told from the ranks that wait for it, with and without collectives in the forward pass."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mamba_pretrain.monitor.compute_clock import ComputeClock
from mamba_pretrain.monitor.diagnose import rank_speeds, straggler_report, stragglers

WORKER = """
import os, sys, time
from pathlib import Path
from types import SimpleNamespace
import torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from mamba_pretrain.monitor.compute_clock import ComputeClock
from mamba_pretrain.monitor.watchdog import Watchdog

run_dir, style, rank = Path(sys.argv[1]), sys.argv[2], int(os.environ["RANK"])
dist.init_process_group("gloo", init_method=f"file://{run_dir}/store", rank=rank, world_size=3)

class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)
    def forward(self, x):
        time.sleep(0.04 if rank == 1 else 0.02)
        return self.linear(x)

model = torch.nn.Sequential(Layer(), Layer(), Layer())
if style == "fsdp2":
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
else:
    model = torch.nn.parallel.DistributedDataParallel(model)
clock = ComputeClock(torch.device("cpu"))
engine = SimpleNamespace(model=model, loss=lambda x: model(x).sum())
clock.watch(engine)
with Watchdog(run_dir, SimpleNamespace(rank=rank), 60) as watchdog:
    for step in range(1, 12):
        engine.loss(torch.ones(1, 8)).backward()
        watchdog.beat(step, "compute", compute_seconds=clock.take())
dist.destroy_process_group()
"""


@pytest.mark.parametrize("style", ["fsdp2", pytest.param("ddp", marks=pytest.mark.slow)])
def test_slowed_rank_is_named(tmp_path: Path, style: str) -> None:
    (tmp_path / "worker.py").write_text(WORKER)
    ranks = [
        subprocess.Popen(
            [sys.executable, str(tmp_path / "worker.py"), str(tmp_path), style],
            env={**os.environ, "RANK": str(rank), "OMP_NUM_THREADS": "1", "SLURMD_NODENAME": f"node{rank}"},
        )
        for rank in range(3)
    ]
    assert [process.wait(timeout=120) for process in ranks] == [0, 0, 0]
    assert [speed.rank for speed in stragglers(rank_speeds(tmp_path))] == [1]
    assert "straggler: rank 1 on node node1" in "\n".join(straggler_report(tmp_path))


def test_clock_adds_up_and_starts_anew() -> None:
    model = torch.nn.Linear(64, 64)
    engine = SimpleNamespace(model=model, loss=lambda x: model(x).sum())
    clock = ComputeClock(torch.device("cpu"))
    clock.watch(engine)
    engine.loss(torch.ones(64, 64))
    one = clock.take()
    assert one > 0.0
    with torch.no_grad():
        model(torch.ones(64, 64))
    assert clock.take() == 0.0, "an evaluation is no part of a step"


@pytest.mark.gpu
def test_clock_times_replays() -> None:
    """Passes of a CUDA graph: each replay counts, with the time it took on the device."""
    device = torch.device("cuda")
    model = torch.nn.Linear(4096, 4096, device=device)
    x = torch.ones(4096, 4096, device=device)
    engine = SimpleNamespace(model=model, loss=lambda x: model(x).sum())
    engine.loss(x)  # loads cuBLAS
    clock = ComputeClock(device)
    clock.watch(engine)
    engine.loss(x)
    torch.cuda.synchronize()
    launched = clock.take()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model(x).sum()
    replayed = clock._counted(lambda: graph.replay())
    for _ in range(3):
        replayed()
    torch.cuda.synchronize()
    assert clock.take() / 3 == pytest.approx(launched, rel=0.9)
    assert clock.take() == 0.0
