"""Parts of a benchmark in a process that is replaced when one goes wrong."""

from __future__ import annotations

import os
import time

import pytest

gpu_worker = pytest.importorskip("gpu_worker")


@pytest.fixture
def worker():
    worker = gpu_worker.Worker()
    yield worker
    worker.stop()


def test_parts_share_a_process_until_one_goes_wrong(worker):
    first = worker.call(os.getpid)
    assert worker.call(os.getpid) == first != os.getpid()
    assert worker.call(int, "x")["error"].startswith("ValueError: invalid literal")
    assert worker.call(os.getpid) == first, "an exception leaves the process as it is"
    assert worker.call(os._exit, 3) == {"error": "its process ended (exit code 3)"}
    second = worker.call(os.getpid)
    assert second != first
    assert worker.call(time.sleep, 60, seconds=0.3) == {"error": "did not finish in 0 s"}
    assert worker.call(os.getpid) not in (first, second)


def test_a_budget_runs_out():
    assert 9.0 < gpu_worker.Budget(10.0).left() <= 10.0
    assert gpu_worker.Budget(-1.0).left() == 0.0
