"""Faults for a run on the local test cluster: what clusters do to long jobs, for the tests, the chaos run and the benchmark."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.jobs import Ledger, Slurm
from launch.local_cluster import LocalCluster


@dataclass
class Drill:
    """A submitted run on a local cluster, and ways to hurt it. Every fault returns a short description of what was done."""

    cluster: LocalCluster
    run_dir: Path
    job: str
    random: random.Random = field(default_factory=lambda: random.Random(0))

    @property
    def slurm(self) -> Slurm:
        """Slurm's commands for this cluster."""
        return Slurm(self.cluster.conf)

    # -- looking

    def rows(self) -> list[dict[str, Any]]:
        """The metrics as they are now, without a torn last line."""
        path = self.run_dir / "metrics.jsonl"
        found = []
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                found.append(json.loads(line))
            except ValueError:
                break
        return found

    def last_step(self) -> int:
        """The last training step in the metrics."""
        return max((row["step"] for row in self.rows() if row["kind"] == "train"), default=0)

    def starts(self) -> int:
        """Attempts so far."""
        return sum(row["event"] == "start" for row in Ledger(self.run_dir).attempts())

    def trained_since(self, moment: float, steps: int = 1) -> bool:
        """Whether so many training rows were made after a moment."""
        return sum(row["kind"] == "train" and row["time"] > moment for row in self.rows()) >= steps

    def rank(self, rank: int) -> dict[str, Any]:
        """The heartbeat of a rank."""
        return json.loads((self.run_dir / "heartbeat" / f"rank-{rank}.json").read_text())

    def ranks(self) -> list[int]:
        """All ranks that have a heartbeat."""
        return sorted(int(path.stem.removeprefix("rank-")) for path in (self.run_dir / "heartbeat").glob("rank-*.json"))

    # -- waiting

    def wait(self, what: str, condition: Callable[[], Any], seconds: float = 120.0) -> Any:
        """The first true value of a condition; a requeued job is spared Slurm's two minutes of delay. TimeoutError with the log's end."""
        deadline, hurried = time.monotonic() + seconds, 0.0
        while time.monotonic() < deadline:
            if time.monotonic() - hurried > 2.0:  # each change makes the scheduler look at the job anew: not too often
                self.cluster.hurry(self.job)
                hurried = time.monotonic()
            if value := condition():
                return value
            time.sleep(0.1)
        log = "\n".join(path.read_text()[-3000:] for path in (self.run_dir / "logs").glob("slurm-*.out"))
        raise TimeoutError(f"waited {seconds:.0f} s for {what}\n{log}")

    def wait_training(self, steps: int = 1, seconds: float = 180.0) -> None:
        """Waits until that many steps were trained from now on."""
        now = time.time()
        self.wait(f"{steps} more steps", lambda: self.trained_since(now, steps) or Ledger(self.run_dir).ended(), seconds)

    def wait_end(self, seconds: float = 300.0) -> None:
        """Waits until the run is done; RuntimeError if it ended for another reason."""
        reason = self.wait("the end of the run", lambda: Ledger(self.run_dir).ended(), seconds)
        if reason != "done":
            log = "".join(path.read_text()[-3000:] for path in (self.run_dir / "logs").glob("slurm-*.out"))
            raise RuntimeError(f"the run ended: {reason}\n{log}")

    # -- hurting

    def time_limit(self) -> str:
        """The job's time limit comes near: Slurm itself sends the warning."""
        minutes = int(self._elapsed() // 60) + 1
        self.slurm.run("scontrol", "update", f"JobId={self.job}", f"TimeLimit={minutes}")
        return f"time limit set to {minutes} min"

    def warning(self) -> str:
        """The warning alone, as Slurm sends it before the time limit."""
        self.slurm.run("scancel", "--batch", "--signal=USR1", self.job)
        return "USR1 to the batch script"

    def requeue(self) -> str:
        """An administrator requeues the job."""
        self.slurm.run("scontrol", "requeue", self.job)
        return "scontrol requeue"

    def terminate(self) -> str:
        """Preemption: SIGTERM to all ranks."""
        self.slurm.run("scancel", "--signal=TERM", self.job)
        return "SIGTERM to the ranks"

    def lose_node(self) -> str:
        """A node of the job goes dark; it comes back when ``heal`` is called."""
        node = self.rank(self.random.choice(self.ranks()))["node"]
        self.cluster.kill_node(node)
        return f"lost {node}"

    def kill_rank(self, rank: int | None = None) -> str:
        """kill -9 of one rank."""
        rank = self.random.choice(self.ranks()) if rank is None else rank
        os.kill(self.rank(rank)["pid"], signal.SIGKILL)
        return f"kill -9 of rank {rank}"

    def kill_rank_in_save(self, rank: int | None = None, seconds: float = 120.0) -> str:
        """kill -9 of one rank while a checkpoint is being written."""
        rank = self.random.choice(self.ranks()) if rank is None else rank
        pid = self.rank(rank)["pid"]
        folder = self.run_dir / "checkpoints"
        deadline = time.monotonic() + seconds
        while not any(folder.glob(".tmp-step-????????")):
            if time.monotonic() > deadline:
                raise TimeoutError(f"no checkpoint was being written for {seconds:.0f} s")
            time.sleep(0.0005)
        os.kill(pid, signal.SIGKILL)
        unfinished = [path.name for path in folder.glob(".tmp-step-????????")]
        return f"kill -9 of rank {rank} while saving ({', '.join(unfinished) or 'just finished'})"

    def freeze_rank(self, rank: int | None = None) -> str:
        """One rank is put to sleep; the watchdogs of the others must find it."""
        rank = self.random.choice(self.ranks()) if rank is None else rank
        os.kill(self.rank(rank)["pid"], signal.SIGSTOP)
        return f"froze rank {rank}"

    @contextlib.contextmanager
    def slowed_rank(self, rank: int) -> Iterator[None]:
        """Inside, one rank gets half of its time: twice as slow as it was."""
        pid, done = self.rank(rank)["pid"], threading.Event()

        def throttle() -> None:
            with contextlib.suppress(ProcessLookupError):
                while not done.is_set():
                    for number in (signal.SIGSTOP, signal.SIGCONT):
                        os.kill(pid, number)
                        time.sleep(0.02)

        thread = threading.Thread(target=throttle)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def heal(self) -> None:
        """Brings lost nodes back."""
        for node in self.cluster.nodes:
            if not self.cluster.node_processes(node):
                self.cluster.start_node(node)

    def _elapsed(self) -> float:
        """Seconds the job has been running, from Slurm's RunTime ([D-]HH:MM:SS)."""
        days, _, clock = self.slurm.job(self.job).get("RunTime", "00:00:00").rpartition("-")
        hours, minutes, seconds = (int(part) for part in clock.split(":"))
        return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60.0 + seconds


def train_rows(rows: list[dict[str, Any]]) -> list[tuple[int, float, float, float]]:
    """What must be the same after any fault: step, loss, gradient norm and learning rate of every training row."""
    return [(row["step"], row["loss"], row["grad_norm"], row["lr"]) for row in rows if row["kind"] == "train"]


def differences(rows: list[dict[str, Any]], reference: list[dict[str, Any]]) -> str | None:
    """The first difference between two trainings, bit for bit, in a sentence; None if there is none."""
    found, expected = train_rows(rows), train_rows(reference)
    for mine, theirs in zip(found, expected, strict=False):
        if mine != theirs:
            return f"step, loss, gradient norm, lr are {mine}, undisturbed {theirs}"
    return None if len(found) == len(expected) else f"{len(found)} steps, undisturbed {len(expected)}"
