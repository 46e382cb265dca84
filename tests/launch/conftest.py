"""A real Slurm cluster for the tests of this folder, and a stand-in for training that starts in a blink."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from launch.config import ClusterConfig
from launch.jobs import Ledger, Slurm
from launch.local_cluster import LocalCluster, missing_programs
from launch.submit import Prepared, prepare_run, send

HERE = Path(__file__).parent
PROJECT = HERE.parents[1]


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """Three nodes, up for the whole session."""
    missing = missing_programs()
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed: apt-get install slurm-wlm munge (make system-packages)")
    if os.geteuid() != 0:
        pytest.skip("the local Slurm cluster needs root")
    running = LocalCluster(tmp_path_factory.mktemp("slurm"), nodes=3)
    running.up()
    yield running
    running.down()


def wait_for(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    """The first true value of ``condition()``; fails with ``what`` after ``seconds``."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.1)
    raise AssertionError(f"waited {seconds:.0f} s for {what}")


@pytest.fixture
def eventually() -> Callable[..., Any]:
    """``eventually(condition)`` waits until it holds."""
    return lambda condition, seconds=40.0: wait_for(condition, seconds, "the condition")


@dataclass
class Job:
    """A submitted run and what can be asked of it."""

    run_dir: Path
    cluster: LocalCluster
    slurm: Slurm
    ids: list[str]

    @property
    def events(self) -> list[str]:
        """Events of the history, in order."""
        return [row["event"] for row in Ledger(self.run_dir).attempts()]

    @property
    def log(self) -> str:
        """Everything the batch scripts printed."""
        return "\n".join(path.read_text() for path in sorted((self.run_dir / "logs").glob("slurm-*.out")))

    def starts(self, rank: int = 0) -> list[dict[str, Any]]:
        """What each start of the toy saw."""
        path = self.run_dir / f"started-{rank}.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def scontrol(self, *arguments: str) -> str:
        """An administrator's command."""
        return self.slurm.run("scontrol", *arguments)

    def wait(self, what: str, condition: Callable[[], Any], seconds: float = 40) -> Any:
        """Waits, not letting a requeued job sit out Slurm's two minutes of delay."""

        hurried = 0.0

        def look() -> Any:
            nonlocal hurried
            if time.monotonic() - hurried > 1.0:
                hurried = time.monotonic()
                for job in self.ids:
                    self.cluster.hurry(job)
            return condition()

        try:
            return wait_for(look, seconds, what)
        except AssertionError as error:
            raise AssertionError(f"{error}\nhistory: {Ledger(self.run_dir).attempts()}\nlog:\n{self.log}") from None

    def wait_started(self, times: int, seconds: float = 40) -> list[dict[str, Any]]:
        """Waits until all four ranks have started so many times (then they obey signals); what rank 0 saw."""
        self.wait(f"start {times}", lambda: all(len(self.starts(rank)) >= times for rank in range(4)), seconds)
        return self.starts()

    def wait_ended(self, seconds: float = 60) -> str:
        """Waits for the end of the run and returns its reason."""
        return self.wait("the end", lambda: Ledger(self.run_dir).ended(), seconds)

    def wait_saved(self, seconds: float = 40) -> None:
        """Waits for a checkpoint."""
        self.wait("a checkpoint", (self.run_dir / "checkpoints" / "latest").exists, seconds)

    def cancel(self) -> None:
        """Cleans up."""
        self.slurm.run("scancel", *self.ids, check=False)


@pytest.fixture
def profile(cluster: LocalCluster, tmp_path: Path) -> dict[str, Any]:
    """Keys of a cluster config for the toy: small lead times, no health check."""
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/bash\ncase "$*" in\n*mamba_pretrain*) exec {sys.executable} -S {HERE}/toy_train.py "$@" ;;\n'
        f'*) exec {sys.executable} "$@" ;;\nesac\n'
    )
    python.chmod(0o755)
    return {
        "nodes": 2,
        "ranks_per_node": 2,
        "time": "10",
        "network": "local",
        "signal_lead": 20,
        "exit_grace": 5,
        "health": {"enabled": False},
        "environment": {"python": str(python)},
        "slurm_conf": str(cluster.conf),
    }


@pytest.fixture
def start(profile: dict[str, Any], tmp_path: Path, cluster: LocalCluster) -> Iterator[Callable[..., Job]]:
    """``start(toy_settings, **cluster_keys)`` submits a toy run; what is left of it is cancelled afterwards."""
    jobs: list[Job] = []

    def submit(toy: dict[str, Any], **keys: Any) -> Job:
        settings = {"steps": 10, "seconds": 0.2, "save_every": 1000, **toy}
        config = ClusterConfig.model_validate({**profile, **keys})
        text = "\n".join(f"{key}: {value}" for key, value in settings.items())
        prepared: Prepared = prepare_run("toy", tmp_path / "run", text, config, PROJECT)
        job = Job(prepared.place.run_dir, cluster, Slurm(config.slurm_conf), send(prepared, config))
        jobs.append(job)
        return job

    yield submit
    for job in jobs:
        job.cancel()
