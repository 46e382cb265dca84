"""One small file per rank that tells where the rank stands: what hang and straggler analysis read.

``RUN/heartbeat/rank-R.json`` is rewritten in place; ``RUN/logs/steps-R.csv`` gets one row per flush, the mean over the steps since.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path

STEP_COLUMNS = "step,steps,step_seconds,compute_seconds"


def node_name() -> str:
    """The node as Slurm calls it, else the host name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


@dataclass
class Heartbeat:
    """Where a rank stands. ``beats`` counts calls of ``Watchdog.beat``: the loop makes the same number on every rank.

    ``progress`` is the time of the last beat, ``time`` of the last write: a fresh file with old progress is a rank that lives but does not
    move; an old file is a rank that is frozen or gone. ``where`` is the main thread's innermost line, ``stack`` all of them when stalled.
    """

    rank: int
    node: str
    pid: int
    step: int = 0
    phase: str = "start"
    beats: int = 0
    progress: float = 0.0
    time: float = 0.0
    state: str = "running"  # running | hung | stopped
    where: str = ""
    stack: list[str] = field(default_factory=list)
    age: float = field(default=0.0, compare=False)  # seconds since the file was written, by the file system's clock; set when read


def path_of(run_dir: Path, rank: int) -> Path:
    """The file of a rank."""
    return run_dir / "heartbeat" / f"rank-{rank}.json"


def write(run_dir: Path, heartbeat: Heartbeat) -> None:
    """Rewrites the rank's file in place: one open and one write, no new directory entry."""
    body = asdict(heartbeat)
    del body["age"]
    data = json.dumps(body).encode()
    descriptor = os.open(path_of(run_dir, heartbeat.rank), os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        os.pwrite(descriptor, data, 0)
        os.ftruncate(descriptor, len(data))
    finally:
        os.close(descriptor)


def read_all(run_dir: Path) -> list[Heartbeat]:
    """The heartbeats of all ranks, by rank. A file that is being rewritten is read again."""
    found = [beat for path in (run_dir / "heartbeat").glob("rank-*.json") if (beat := _read(path)) is not None]
    # Ages are differences between times of one clock, the file system's: those of the nodes may disagree.
    newest = max((beat.age for beat in found), default=0.0)
    for beat in found:
        beat.age = newest - beat.age
    return sorted(found, key=lambda beat: beat.rank)


def _read(path: Path) -> Heartbeat | None:
    for _ in range(5):
        try:
            beat = Heartbeat(**json.loads(path.read_bytes()))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError):
            time.sleep(0.02)
            continue
        beat.age = path.stat().st_mtime
        return beat
    return None


def main_thread_stack() -> list[str]:
    """The main thread's Python frames, outermost first, as ``file:line in function: source``."""
    identity = threading.main_thread().ident
    frame = sys._current_frames().get(identity) if identity is not None else None
    if frame is None:
        return []
    return [f"{f.filename}:{f.lineno} in {f.name}: {f.line}" for f in traceback.extract_stack(frame)]


class StepLog:
    """Means of step and compute time, appended to ``logs/steps-R.csv`` at each flush: about 300 kB a day whatever the step time."""

    def __init__(self, run_dir: Path, rank: int) -> None:
        self._path = run_dir / "logs" / f"steps-{rank}.csv"
        self._lock = threading.Lock()
        self._sums = [0.0, 0.0]
        self._steps = 0
        self._last_step = 0

    def add(self, step: int, seconds: float, compute_seconds: float) -> None:
        """One step: its whole time, and the part in which this rank worked rather than waited for others."""
        with self._lock:
            self._sums[0] += seconds
            self._sums[1] += compute_seconds
            self._steps += 1
            self._last_step = step

    def flush(self) -> None:
        """Appends the mean since the last flush, if there was a step."""
        with self._lock:
            if not self._steps:
                return
            row = f"{self._last_step},{self._steps},{self._sums[0] / self._steps:.6f},{self._sums[1] / self._steps:.6f}\n"
            self._sums, self._steps = [0.0, 0.0], 0
        new = not self._path.exists()
        with self._path.open("a") as file:
            file.write(f"{STEP_COLUMNS}\n{row}" if new else row)
