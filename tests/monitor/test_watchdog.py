"""The watchdog names the rank that stands still, and where, while the others wait for it in a collective."""

import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from mamba_pretrain.exit_codes import REQUEUE
from mamba_pretrain.monitor.heartbeat import Heartbeat, read_all
from mamba_pretrain.monitor.watchdog import Watchdog, analyse

WORKER = """
import os, sys, time, signal
from pathlib import Path
from types import SimpleNamespace
import torch, torch.distributed as dist
from mamba_pretrain.monitor.watchdog import Watchdog

run_dir, fault, timeout = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
dist.init_process_group("gloo", init_method=f"file://{run_dir}/store", rank=int(os.environ["RANK"]), world_size=3)
rank = dist.get_rank()

def fall_asleep():
    (run_dir / "asleep").write_text(str(time.time()))
    if fault == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(600)

with Watchdog(run_dir, SimpleNamespace(rank=rank), timeout) as watchdog:
    for step in range(1, 100):
        watchdog.beat(step, "data")
        time.sleep(0.5)
        if rank == 1 and step == 3:
            fall_asleep()
        watchdog.beat(step, "compute", compute_seconds=0.01)
        dist.all_reduce(torch.ones(1))
"""


def start_ranks(run_dir: Path, fault: str, timeout: float) -> list[subprocess.Popen]:
    script = run_dir / "worker.py"
    script.write_text(WORKER)
    environment = {"OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    return [
        subprocess.Popen(
            [sys.executable, str(script), str(run_dir), fault, str(timeout)],
            env={**environment, "RANK": str(rank), "SLURMD_NODENAME": f"node{rank + 1}"},
            stderr=subprocess.DEVNULL,
        )
        for rank in range(3)
    ]


@pytest.mark.parametrize("fault", ["sleep", "stop"])
def test_sleeping_rank_is_named_in_time(tmp_path: Path, fault: str) -> None:
    timeout = 3.0
    ranks = start_ranks(tmp_path, fault, timeout)
    try:
        waking = [ranks[0], ranks[2]] if fault == "stop" else ranks
        codes = [process.wait(timeout=60) for process in waking]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    assert codes == [REQUEUE] * len(waking)
    report = json.loads((tmp_path / "hang.json").read_text())
    assert (report["rank"], report["node"], report["step"], report["phase"], report["suspects"]) == (1, "node2", 3, "data", [1])
    assert report["time"] - float((tmp_path / "asleep").read_text()) < timeout + 10
    assert {place["rank"] for place in report["ranks"]} == {0, 1, 2}
    if fault == "sleep":  # a stopped process cannot tell where it is; its last line is from before
        assert "fall_asleep" in report["where"]
        assert any("fall_asleep" in line for line in report["stack"])
        assert "fall_asleep" in (tmp_path / "logs" / "stack-rank-1.txt").read_text()
    else:
        assert "frozen or gone" in report["evidence"]
    assert "all_reduce" in (tmp_path / "logs" / "stack-rank-0.txt").read_text()


def test_beats_in_time_keep_it_quiet(tmp_path: Path) -> None:
    left: list[int] = []
    with Watchdog(tmp_path, SimpleNamespace(rank=0), timeout=0.6, leave=left.append) as watchdog:
        for step in range(1, 6):
            watchdog.beat(step, "compute", compute_seconds=0.01)
            time.sleep(0.2)
        watchdog.beat(6, "save", allow=60.0)
        time.sleep(1.2)
    assert not left
    assert not (tmp_path / "hang.json").exists()
    (beat,) = read_all(tmp_path)
    assert (beat.step, beat.phase, beat.state) == (6, "save", "stopped")


def test_hang_runs_the_callback_before_leaving(tmp_path: Path) -> None:
    calls: list[object] = []
    watchdog = Watchdog(tmp_path, SimpleNamespace(rank=0), 0.3, on_hang=lambda report: calls.append(report["step"]), leave=calls.append)
    with watchdog:
        watchdog.beat(7, "compute")
        time.sleep(5)
    assert calls == [7, REQUEUE]


def beat(rank: int, **changes: object) -> Heartbeat:
    values = {
        "node": f"n{rank}",
        "pid": 1,
        "step": 5,
        "phase": "compute",
        "beats": 10,
        "where": "/x/torch/distributed/c.py:1 in all_reduce",
    }
    return Heartbeat(rank, **{**values, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("odd", "evidence"),
    [
        ({"age": 30.0}, "frozen"),
        ({"beats": 9, "phase": "data"}, "fell behind"),
        ({"where": "/x/loader.py:3 in read"}, "outside the collective"),
    ],
)
def test_analysis_prefers_the_strongest_evidence(odd: dict, evidence: str) -> None:
    report = analyse([beat(0), beat(1, **odd), beat(2)], timeout=60, stale_after=10)
    assert report["suspects"] == [1]
    assert evidence in report["evidence"]


def test_analysis_does_not_guess() -> None:
    report = analyse([beat(0), beat(1)], timeout=60, stale_after=10)
    assert report["suspects"] == [0, 1]
    assert "all others" in report["evidence"]
