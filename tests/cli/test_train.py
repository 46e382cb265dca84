"""The loop through the command line: engines agree, a killed run continues bit for bit, wrong input is one sentence."""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path

import psutil
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


def wait_for_checkpoint(folder: Path, process: subprocess.Popen, seconds: float = 240.0) -> None:
    """Until a checkpoint is complete: it is written in the background, some steps after the one it belongs to."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if folder.is_dir():
            return
        assert process.poll() is None, "the run ended before it was killed"
        time.sleep(0.01)
    raise AssertionError(f"no {folder.name} within {seconds} s")


def kill_all(process: subprocess.Popen) -> None:
    """kill -9 for the launcher and all its ranks at once; torchrun gives each rank a session of its own, so their group does not reach them."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        member.kill()
    process.wait()
    psutil.wait_procs(family)


@pytest.mark.parametrize("strategy", ["single", "fsdp2", "zero2"])
def test_a_killed_run_continues_bit_for_bit(workspace, strategy):
    processes, options = ENGINES[strategy], (f"parallel.strategy={strategy}", "checkpoint.every_steps=20", "train.steps=80")
    undisturbed, killed = f"whole-{strategy}", f"killed-{strategy}"
    assert workspace.train(undisturbed, *options, processes=processes).returncode == 0

    process = workspace.start(killed, *options, processes=processes)
    wait_for_checkpoint(workspace.root / killed / "checkpoints" / "step-00000020", process)
    kill_all(process)
    result = workspace.train(killed, *options, processes=processes)
    assert result.returncode == 0, result.stderr

    expected, found = workspace.rows(undisturbed), workspace.rows(killed)
    assert [[row[key] for key in EXACT] for row in found] == [[row[key] for key in EXACT] for row in expected]
    assert [row["step"] for row in found] == list(range(1, 81))
    first_resumed = next(row["step"] for row in found if row["restart"] == 1)
    assert first_resumed > 20
    assert first_resumed % 20 == 1, "a run continues behind its last complete checkpoint"
    shutil.rmtree(workspace.root / killed)
