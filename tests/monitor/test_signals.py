"""A signal to one rank stops every rank at the same step, and nothing happens inside the handler."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mamba_pretrain.monitor.signals import STOP_FILE_VARIABLE, StopSignal

WORKER = """
import os, signal, sys, time
import torch.distributed as dist
from mamba_pretrain.monitor.signals import StopSignal

dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=int(os.environ["RANK"]), world_size=2)
stop = StopSignal(world_size=2)
for step in range(1, 200):
    if step == 5 and dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGUSR1)
    reason = stop.agreed()
    if reason:
        break
    time.sleep(0.01 * dist.get_rank())
print(step, reason)
stop.close()
dist.destroy_process_group()
"""


def test_all_ranks_stop_at_the_same_step(tmp_path: Path) -> None:
    (tmp_path / "worker.py").write_text(WORKER)
    ranks = [
        subprocess.Popen(
            [sys.executable, str(tmp_path / "worker.py"), str(tmp_path / "store")],
            env={**os.environ, "RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=60)[0].strip() for process in ranks]
    assert outputs == ["6 SIGUSR1", "6 SIGUSR1"]


@pytest.mark.parametrize(("number", "reason"), [(signal.SIGUSR1, "SIGUSR1"), (signal.SIGTERM, "SIGTERM")])
def test_signal_sets_the_flag(number: signal.Signals, reason: str) -> None:
    before = signal.getsignal(number)
    stop = StopSignal()
    try:
        assert stop.agreed() is None
        os.kill(os.getpid(), number)
        assert stop.requested
        assert stop.agreed() == reason
    finally:
        stop.close()
    assert signal.getsignal(number) == before


def test_stop_file_works_without_signals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(STOP_FILE_VARIABLE, str(tmp_path / "stop"))
    monkeypatch.setattr("mamba_pretrain.monitor.signals.STOP_FILE_EVERY", 0.0)
    stop = StopSignal()
    try:
        assert stop.agreed() is None
        (tmp_path / "stop").touch()
        assert stop.agreed() == "stop file"
    finally:
        stop.close()
