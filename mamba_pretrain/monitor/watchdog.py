"""Notices that a rank no longer moves, says which one and where it stands, and ends the process so that the job is started again."""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from mamba_pretrain.exit_codes import REQUEUE
from mamba_pretrain.monitor import heartbeat
from mamba_pretrain.monitor.heartbeat import Heartbeat, StepLog

COLLECT_SECONDS = 3.0  # time given to the other ranks to write their stacks before the report is made
# A rank whose innermost Python frame is here waits for others (or for the device); the one that is not, keeps them waiting.
WAITING_PLACES = ("torch/distributed/", "torch/autograd/graph.py", "torch/cuda/", "deepspeed/comm/")


class HasRank(Protocol):
    """What the watchdog asks of a topology."""

    @property
    def rank(self) -> int: ...


class Watchdog:
    """A thread beside the loop of each rank.

    The loop calls ``beat`` several times a step, equally often on every rank. Without a beat for ``timeout`` seconds the rank dumps the
    Python stacks of its threads to ``logs/stack-rank-R.txt``, one rank writes ``hang.json`` (the suspect's rank, node, line and stack, and
    where everybody else stands), and the process exits with 85: the batch script starts the run again from its last checkpoint.

    A thread cannot run while C code keeps the interpreter's lock: then faulthandler's own timer dumps the stacks, the rank's
    heartbeat goes stale, and the others name it.
    """

    def __init__(
        self,
        run_dir: Path,
        topology: HasRank,
        timeout: float,
        on_hang: Callable[[dict[str, Any]], None] | None = None,
        leave: Callable[[int], None] = os._exit,
    ) -> None:
        """``timeout`` in seconds. ``on_hang(report)`` may save what it can before ``leave`` ends the process."""
        self._run_dir = Path(run_dir)
        self._timeout = timeout
        self._interval = max(0.2, min(10.0, timeout / 10))
        self._on_hang = on_hang
        self._leave = leave
        self._beat = Heartbeat(topology.rank, heartbeat.node_name(), os.getpid())
        self._steps: StepLog | None = None
        self._step_began: float | None = None
        self._deadline = float("inf")
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._stack_file: Any = None

    def start(self) -> Watchdog:
        """Starts the thread; from now on a beat is expected every ``timeout`` seconds."""
        for folder in ("heartbeat", "logs"):
            (self._run_dir / folder).mkdir(parents=True, exist_ok=True)
        self._steps = StepLog(self._run_dir, self._beat.rank)
        self._stack_file = (self._run_dir / "logs" / f"stack-rank-{self._beat.rank}.txt").open("a")
        self._record_progress(0.0)
        self._refresh()
        self._thread.start()
        return self

    def beat(self, step: int, phase: str, compute_seconds: float | None = None, allow: float = 0.0) -> None:
        """The rank enters ``phase`` of ``step``.

        ``compute_seconds`` is given once a step: the time this rank worked, without waiting in collectives. ``allow`` grants the phase
        that many seconds beyond the timeout (a long save, a first compilation).
        """
        self._beat.step, self._beat.phase = step, phase
        self._beat.beats += 1
        self._record_progress(allow)
        if compute_seconds is None or self._steps is None:
            return
        now = time.monotonic()
        if self._step_began is not None:  # the first step of a process compiles and warms up: it says nothing about stragglers
            self._steps.add(step, now - self._step_began, compute_seconds)
        self._step_began = now

    def stop(self) -> None:
        """Ends the thread in good order."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        if self._steps is not None:
            self._steps.flush()
            self._beat.state = "stopped"
            self._refresh()
        if self._stack_file is not None:
            self._stack_file.close()
            self._stack_file = None

    def __enter__(self) -> Watchdog:
        return self.start()

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def _record_progress(self, allow: float) -> None:
        self._beat.progress = time.time()
        self._deadline = time.monotonic() + self._timeout + allow
        if self._stack_file is not None:
            faulthandler.dump_traceback_later(self._timeout + allow + 2 * self._interval, file=self._stack_file)

    def _watch(self) -> None:
        while not self._ended.wait(self._interval):
            if time.monotonic() > self._deadline:
                self._hang()
                return
            self._refresh()
            if self._steps is not None:
                self._steps.flush()

    def _refresh(self) -> None:
        """Rewrites the heartbeat; a full disk or a lost mount must not end the run."""
        stack = heartbeat.main_thread_stack()
        self._beat.where = stack[-1] if stack else ""
        stalled = self._beat.state == "hung" or time.time() - self._beat.progress > 2 * self._interval
        self._beat.stack = stack if stalled else []
        self._beat.time = time.time()
        try:
            heartbeat.write(self._run_dir, self._beat)
        except OSError as error:
            print(f"watchdog: cannot write the heartbeat of rank {self._beat.rank}: {error}", file=sys.stderr)

    def _hang(self) -> None:
        """Reports and leaves, whatever goes wrong on the way."""
        try:
            faulthandler.cancel_dump_traceback_later()
            faulthandler.dump_traceback(self._stack_file, all_threads=True)
            self._stack_file.flush()
            dump_flight_recorder(self._run_dir / "logs" / f"nccl-trace-rank-{self._beat.rank}.pickle")
            self._beat.state = "hung"
            self._refresh()
            report = self._report()
            print(f"watchdog: {report['sentence']}; exiting with {REQUEUE}", file=sys.stderr, flush=True)
            if self._on_hang is not None:
                self._on_hang(report)
        finally:
            self._leave(REQUEUE)

    def _report(self) -> dict[str, Any]:
        """Lets the lowest rank that can write ``hang.json``; the others read it."""
        path = self._run_dir / "hang.json"
        self._ended.wait(COLLECT_SECONDS + min(0.1 * self._beat.rank, 2.0))
        if path.exists():
            report = json.loads(path.read_text())
            if report["time"] > self._beat.progress:
                return report
        # A frozen rank has been silent for about the timeout by now; a living one wrote within the last interval.
        report = analyse(heartbeat.read_all(self._run_dir), self._timeout, stale_after=max(2 * self._interval, min(2.0, self._timeout / 2)))
        temporary = path.with_name(f".hang-{self._beat.rank}.json")
        temporary.write_text(json.dumps(report, indent=1) + "\n")
        os.replace(temporary, path)
        return report


def analyse(beats: list[Heartbeat], timeout: float, stale_after: float) -> dict[str, Any]:
    """The report of a hang: the suspect ranks, the evidence, and where every rank stands.

    In this order: ranks whose heartbeat file was not written for ``stale_after`` seconds (frozen, or their node is gone); ranks with fewer
    beats than others (they never arrived where the others wait); ranks that stand outside any collective; all of them.
    """
    living = [beat for beat in beats if beat.state != "stopped"]
    suspects, evidence = _suspects(living or beats, stale_after)
    first = suspects[0]
    others = f" (and ranks {', '.join(str(s.rank) for s in suspects[1:9])})" if len(suspects) > 1 else ""
    sentence = (
        f"rank {first.rank}{others} on node {first.node} {evidence}: step {first.step}, phase {first.phase}, "
        f"at {first.where or 'an unknown line'}; no progress for {timeout:g} s"
    )
    named = {key: value for key, value in asdict(first).items() if key in ("rank", "node", "pid", "step", "phase", "where", "stack")}
    return {
        "time": time.time(),
        "timeout": timeout,
        "sentence": sentence,
        "evidence": evidence,
        "suspects": [s.rank for s in suspects],
        **named,
        "ranks": [_where_it_stands(beat) for beat in beats],
    }


def _where_it_stands(beat: Heartbeat) -> dict[str, Any]:
    place = {key: value for key, value in asdict(beat).items() if key in ("rank", "node", "step", "phase", "beats", "where", "state")}
    return place | {"silent_seconds": round(beat.age, 1)}


def _suspects(beats: list[Heartbeat], stale_after: float) -> tuple[list[Heartbeat], str]:
    frozen = [beat for beat in beats if beat.age > stale_after]
    if frozen and len(frozen) < len(beats):
        return frozen, "is frozen or gone (its heartbeat stopped)"
    fewest = min(beat.beats for beat in beats)
    behind = [beat for beat in beats if beat.beats == fewest]
    if len(behind) < len(beats):
        return behind, "fell behind and keeps the others waiting"
    outside = [beat for beat in beats if not any(place in beat.where for place in WAITING_PLACES)]
    if outside and len(outside) < len(beats):
        return outside, "stands outside the collective in which the others wait"
    return beats, "stands still together with all others"


def dump_flight_recorder(path: Path) -> None:
    """Writes NCCL's record of the last collectives (read it with ``torchfrtrace``); nothing without NCCL."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_initialized() or "nccl" not in str(distributed.get_backend()):
        return
    from torch._C import _distributed_c10d

    path.write_bytes(_distributed_c10d._dump_nccl_trace())  # type: ignore[attr-defined]  # only builds with NCCL have it
