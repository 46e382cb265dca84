"""How long a rank computes by itself, without the time it waits for others: the measure that tells a straggler from its victims.

In lockstep all ranks take the same time for a step; only the part outside collectives differs. The forward pass shows it under every
engine: without communication under DDP and ZeRO-1/2, and with waits that pass through ``Work.wait`` under FSDP2 and ZeRO-3, where they
are subtracted. (On GPUs a sharded forward pass waits on the device, inside the events: there only the data wait tells.)
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")

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


class ComputeClock:
    """Adds up the computing time of the functions it times; ``take`` returns the sum since the last ``take``.

    On a GPU the work is only queued when a function returns: pairs of events measure it there, and ``take`` gives the pairs that are
    finished (about a step late) without waiting for the device.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds = 0.0
        self._events: list[tuple[Any, Any]] = []
        if not self._cuda:
            _count_waits()

    def timed(self, function: Callable[..., Result]) -> Callable[..., Result]:
        """The function, timed."""

        @wraps(function)
        def run(*arguments: Any, **options: Any) -> Result:
            finish = self._begin_cuda() if self._cuda else self._begin_cpu()
            try:
                return function(*arguments, **options)
            finally:
                finish()

        return run

    def take(self) -> float:
        """Seconds since the last call."""
        while self._events and self._events[0][1].query():
            first, last = self._events.pop(0)
            self._seconds += first.elapsed_time(last) / 1000
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _begin_cpu(self) -> Callable[[], None]:
        began, waited = time.perf_counter(), _waited

        def finish() -> None:
            self._seconds += time.perf_counter() - began - (_waited - waited)

        return finish

    def _begin_cuda(self) -> Callable[[], None]:
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()  # type: ignore[no-untyped-call]
        self._events.append((first, last))
        return last.record
