"""The straggler report names the slow rank; the hang report reads what the watchdog wrote."""

import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from mamba_pretrain.monitor.diagnose import hang_report, liveness_report, rank_speeds, straggler_report, stragglers
from mamba_pretrain.monitor.watchdog import Watchdog


def drive(run_dir: Path, rank: int, compute: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten steps of 30 ms in lockstep with others; this rank computes for ``compute`` seconds of each."""
    monkeypatch.setenv("SLURMD_NODENAME", f"node{rank}")
    with Watchdog(run_dir, SimpleNamespace(rank=rank), 60) as watchdog:
        for step in range(1, 12):
            watchdog.beat(step, "compute", compute_seconds=compute)
            time.sleep(0.03)


def test_rank_slowed_by_two_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for rank in range(4):
        drive(tmp_path, rank, 0.02 if rank == 2 else 0.01, monkeypatch)
    speeds = rank_speeds(tmp_path)
    assert [speed.steps for speed in speeds] == [10] * 4
    assert [speed.rank for speed in stragglers(speeds)] == [2]
    report = "\n".join(straggler_report(tmp_path))
    assert "straggler: rank 2 on node node2 computes 2.0x as long" in report
    assert "slowest is rank 2" in report


def test_equal_ranks_are_not_blamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for rank in range(2):
        drive(tmp_path, rank, 0.01, monkeypatch)
    assert "stragglers: none" in "\n".join(straggler_report(tmp_path))


def test_empty_run_says_so(tmp_path: Path) -> None:
    assert hang_report(tmp_path) == ["hangs: none reported"]
    assert liveness_report(tmp_path) == ["heartbeats: none yet"]
    assert "no step times" in straggler_report(tmp_path)[0]
