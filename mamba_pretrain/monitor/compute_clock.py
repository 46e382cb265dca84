"""How long a rank computes by itself, without the time it waits for others: the measure that tells a straggler from its victims.

In lockstep all ranks take the same time for a step; only the part outside collectives differs. The forward pass shows it under every
engine: without communication under DDP and ZeRO-1/2, and with waits that pass through ``Work.wait`` under FSDP2 and ZeRO-3, where they
are subtracted. (On GPUs a sharded forward pass waits on the device, inside the events: there only the data wait tells.)

A forward pass that is recorded as a CUDA graph takes its events along, and every replay sets them anew.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")

# Pairs of events of recorded passes that are looked at: the newest, since recordings that are given up and made again leave theirs behind.
RECORDINGS = 8

_waited = 0.0  # seconds this process has spent in Work.wait since _count_waits
_counting = False


def _count_waits() -> None:
    """Makes every wait for a collective add to ``_waited``; on GPUs these calls do not block and add nothing."""
    global _counting
    if _counting or not torch.distributed.is_available():
        return
    _counting = True
    work: Any = torch.distributed.Work
    original = work.wait

    @wraps(original)
    def wait(*arguments: Any, **options: Any) -> Any:
        global _waited
        began = time.perf_counter()
        try:
            return original(*arguments, **options)
        finally:
            _waited += time.perf_counter() - began

    work.wait = wait


def _seconds_between(first: Any, last: Any) -> float:
    """Between two events of a recording; 0 while no replay has passed both, negative while a later one is between them."""
    try:
        return first.elapsed_time(last) / 1000 if first.query() and last.query() else 0.0
    except RuntimeError:  # CUDA's word for an event that no replay has reached yet
        return 0.0


class ComputeClock:
    """Adds up the time of a model's training forward passes; ``take`` returns the sum since the last ``take``.

    On a GPU the work is only queued when a function returns: pairs of events measure it there, and ``take`` gives the pairs that are
    finished (about a step late) without waiting for the device. Of recorded passes it gives the last one's time for each micro-batch.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds = 0.0
        self._events: list[tuple[Any, Any]] = []
        self._recorded: deque[tuple[Any, Any]] = deque(maxlen=RECORDINGS)
        self._recorded_seconds = 0.0  # of one pass
        self._passes = 0  # micro-batches whose forward pass was not launched, since the last `take`
        self._finish: Callable[[], None] | None = None
        if not self._cuda:
            _count_waits()

    def watch(self, engine: Any) -> None:
        """Times the training forward passes of ``engine.model``, launched or replayed."""
        engine.model.register_forward_pre_hook(self._before)
        engine.model.register_forward_hook(self._after)
        engine.loss = self._counted(engine.loss)

    def _counted(self, loss: Callable[..., Result]) -> Callable[..., Result]:
        @wraps(loss)
        def run(*arguments: Any, **options: Any) -> Result:
            launched = len(self._events)
            result = loss(*arguments, **options)
            self._passes += self._cuda and len(self._events) == launched
            return result

        return run

    def _before(self, module: torch.nn.Module, inputs: Any) -> None:
        self._finish = self._begin() if torch.is_grad_enabled() else None

    def _after(self, module: torch.nn.Module, inputs: Any, output: Any) -> None:
        if self._finish is not None:
            self._finish()
            self._finish = None

    def take(self) -> float:
        """Seconds since the last call."""
        while self._events and self._events[0][1].query():
            first, last = self._events.pop(0)
            self._seconds += first.elapsed_time(last) / 1000
        if self._passes:
            self._seconds += self._passes * self._of_recorded()
            self._passes = 0
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _of_recorded(self) -> float:
        """Seconds of a recorded pass: the last that is finished and not begun again."""
        times = [seconds for first, last in self._recorded if (seconds := _seconds_between(first, last)) > 0.0]
        if times:
            self._recorded_seconds = sum(times) / len(times)
        return self._recorded_seconds

    def _begin(self) -> Callable[[], None]:
        return self._begin_cuda() if self._cuda else self._begin_cpu()

    def _begin_cpu(self) -> Callable[[], None]:
        began, waited = time.perf_counter(), _waited

        def finish() -> None:
            self._seconds += time.perf_counter() - began - (_waited - waited)

        return finish

    def _begin_cuda(self) -> Callable[[], None]:
        recording = torch.cuda.is_current_stream_capturing()
        first, last = (torch.cuda.Event(enable_timing=True, external=recording) for _ in range(2))
        first.record()  # type: ignore[no-untyped-call]
        (self._recorded if recording else self._events).append((first, last))
        return last.record
