"""The loop through the command line: engines agree, a killed run continues bit for bit, wrong input is one sentence."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time

import pytest

ENGINES = {"single": 1, "ddp": 2, "fsdp2": 2, "zero1": 2, "zero2": 2, "zero3": 2}
# Columns of a train row that do not depend on the clock.
EXACT = ("step", "tokens", "loss", "lr", "grad_norm")


@pytest.fixture(scope="module")
def single_losses(workspace):
    """20 losses of one process."""
    result = workspace.train("agree-single", "train.steps=20", "parallel.strategy=single", "checkpoint.every_steps=null")
    assert result.returncode == 0, result.stderr
    return workspace.losses("agree-single")


@pytest.mark.parametrize("strategy", [name for name in ENGINES if name != "single"])
def test_engines_give_the_same_losses(workspace, single_losses, strategy):
    overrides = ("train.steps=20", f"parallel.strategy={strategy}", "checkpoint.every_steps=null")
    result = workspace.train(f"agree-{strategy}", *overrides, processes=ENGINES[strategy])
    assert result.returncode == 0, result.stderr
    assert len(single_losses) == 20
    assert workspace.losses(f"agree-{strategy}") == pytest.approx(single_losses, rel=1e-5)
    assert single_losses[-1] < 0.95 * single_losses[0]


def wait_for_step(workspace, run: str, step: int, process: subprocess.Popen, seconds: float = 120.0) -> None:
    """Until the run's metrics reach ``step``."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if (workspace.root / run / "metrics.jsonl").exists() and any(row["step"] >= step for row in workspace.rows(run)):
            return
        assert process.poll() is None, "the run ended before it was killed"
        time.sleep(0.02)
    raise AssertionError(f"no step {step} within {seconds} s")


def kill_group(process: subprocess.Popen) -> None:
    """kill -9 for the launcher and all its ranks at once."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.parametrize("strategy", ["single", "fsdp2", "zero2"])
def test_a_killed_run_continues_bit_for_bit(workspace, strategy):
    processes, options = ENGINES[strategy], (f"parallel.strategy={strategy}", "checkpoint.every_steps=20")
    undisturbed, killed = f"whole-{strategy}", f"killed-{strategy}"
    assert workspace.train(undisturbed, *options, processes=processes).returncode == 0

    process = workspace.start(killed, *options, processes=processes)
    wait_for_step(workspace, killed, 23, process)
    kill_group(process)
    result = workspace.train(killed, *options, processes=processes)
    assert result.returncode == 0, result.stderr

    expected, found = workspace.rows(undisturbed), workspace.rows(killed)
    assert [[row[key] for key in EXACT] for row in found] == [[row[key] for key in EXACT] for row in expected]
    assert [row["step"] for row in found] == list(range(1, 41))
    assert {row["restart"] for row in found if row["step"] > 20} == {1}
    shutil.rmtree(workspace.root / killed)
