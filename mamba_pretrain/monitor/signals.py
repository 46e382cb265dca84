"""Stopping in good order: a signal sets a flag, all ranks agree on it, and the loop stops at the same step everywhere.

Nothing is saved inside a signal handler: a save that interrupts another save, or a collective, corrupts or deadlocks now and then.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

STOP_FILE_VARIABLE = "MAMBA_PRETRAIN_STOP_FILE"  # set by the batch script; torchrun and deepspeed do not hand USR1 to their workers
STOP_FILE_EVERY = 2.0  # seconds between looks at the file system
CLOSE_SECONDS = 5.0  # given to peers that may have died when a run ends by an error

REASONS = {1: "stop file", 2: "SIGUSR1", 3: "SIGTERM"}
CODES = {signal.SIGUSR1: 2, signal.SIGTERM: 3}


class StopSignal:
    """Catches SIGUSR1 (time limit ahead), SIGTERM (preemption, cancel) and the stop file of the batch script.

    ``agreed()`` is called once a step by every rank. The reduction of step k is started then and read at step k+1, so the loop never
    waits for it; every rank reads the same value at the same step. It runs on a gloo group, because reading an NCCL result would
    make the host wait for the GPU.
    """

    def __init__(self, world_size: int = 1) -> None:
        """Installs the handlers; must run in the main thread."""
        self._code = 0
        self._world_size = world_size
        self._group: Any = None
        self._pending: tuple[Any, Any] | None = None
        self._stop_file = Path(os.environ[STOP_FILE_VARIABLE]) if os.environ.get(STOP_FILE_VARIABLE) else None
        self._looked_at = 0.0
        self._previous = {number: signal.signal(number, self._on_signal) for number in CODES}

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._code = max(self._code, CODES[signal.Signals(number)])

    @property
    def requested(self) -> bool:
        """Whether this rank was told to stop; others may not know yet."""
        return bool(self._code)

    def agreed(self) -> str | None:
        """The reason to stop, the same on every rank at the same call, or None."""
        self._look_for_stop_file()
        if self._world_size == 1:
            return REASONS.get(self._code)
        code = self._finish_pending()
        if not code:
            self._start_pending()
        return REASONS.get(code)

    def close(self) -> None:
        """Finishes the reduction under way and puts the previous handlers back; a peer that is gone is no matter any more."""
        with contextlib.suppress(RuntimeError):
            self._finish_pending(CLOSE_SECONDS)
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _look_for_stop_file(self) -> None:
        if self._stop_file is None or time.monotonic() - self._looked_at < STOP_FILE_EVERY:
            return
        self._looked_at = time.monotonic()
        if self._stop_file.exists():
            self._code = max(self._code, 1)

    def _start_pending(self) -> None:
        import torch
        import torch.distributed as dist

        if self._group is None:
            self._group = dist.new_group(backend="gloo")
        flag = torch.tensor([self._code], dtype=torch.int32)
        self._pending = dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group, async_op=True), flag

    def _finish_pending(self, seconds: float | None = None) -> int:
        if self._pending is None:
            return 0
        work, flag = self._pending
        self._pending = None
        work.wait(*([] if seconds is None else [datetime.timedelta(seconds=seconds)]))
        return int(flag)
