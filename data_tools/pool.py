"""Jobs in spawned processes, with progress; the loss of a process, or of the parent, is noticed at once."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from data_tools.errors import UserError

Report = Callable[[Any], None]
Job = Callable[[int, Report], Any]
"""Does the job of a number, and reports progress as it likes."""


def available_cores() -> int:
    """Cores that this process may use, which a batch system may have made fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_jobs(
    numbers: Sequence[int], open_job: Callable[[Any], Job], payload: Any, workers: int, report: Report
) -> Iterator[tuple[int, Any]]:
    """Yields ``(number, result)`` as jobs end; ``report`` is called here with what they report on the way.

    ``open_job(payload)`` is called once in each process and must be importable. An exception in a job ends all of them and is raised here;
    so does the death of a process, as UserError.
    """
    if not numbers:
        return
    if workers == 1 or len(numbers) == 1:
        job = open_job(payload)
        yield from ((number, job(number, report)) for number in numbers)
        return
    pool = _Pool(open_job, payload, min(workers, len(numbers)))
    try:
        yield from pool.run(list(reversed(numbers)), report)
    finally:
        pool.close()


class _Pool:
    def __init__(self, open_job: Callable[[Any], Job], payload: Any, workers: int) -> None:
        context = multiprocessing.get_context("spawn")  # a forked process would inherit the tokenizer libraries' threads in unknown states
        self.workers: dict[Connection, BaseProcess] = {}
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, open_job, payload), daemon=True)
            process.start()
            theirs.close()  # so that the end of the worker is the end of the pipe
            self.workers[ours] = process

    def run(self, waiting: list[int], report: Report) -> Iterator[tuple[int, Any]]:
        """Hands out numbers from the end of ``waiting``."""
        running: dict[Connection, int] = {}
        for connection in self.workers:
            self._give(connection, waiting, running)
        while running:
            for connection in [ready for ready in wait(list(running)) if isinstance(ready, Connection)]:
                number = running[connection]
                try:
                    what, value = connection.recv()
                except (EOFError, ConnectionError):
                    raise self._lost(connection) from None
                if what == "error":
                    raise value
                if what == "progress":
                    report(value)
                    continue
                del running[connection]
                self._give(connection, waiting, running)
                yield number, value

    def _give(self, connection: Connection, waiting: list[int], running: dict[Connection, int]) -> None:
        if waiting:
            running[connection] = waiting.pop()
            with contextlib.suppress(ConnectionError):  # a dead worker is reported when its answer is awaited
                connection.send(running[connection])

    def _lost(self, connection: Connection) -> UserError:
        process = self.workers[connection]
        process.join(10)
        code = process.exitcode
        how = f"was killed by signal {-code} ({signal.Signals(-code).name})" if code is not None and code < 0 else f"ended with code {code}"
        return UserError(
            f"a worker process {how}, for want of memory perhaps; finished work is kept: the same command continues, --workers sets how many"
        )

    def close(self) -> None:
        """Ends the workers, in the middle of a job too: jobs leave nothing but temporary files."""
        for connection, process in self.workers.items():
            connection.close()
            process.terminate()
        for process in self.workers.values():
            process.join()


def _work(connection: Connection, open_job: Callable[[Any], Job], payload: Any) -> None:
    """A worker's life. When the parent dies the pipe breaks at the next report, and the worker ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is told by the same key press, and ends the workers
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        job = open_job(payload)
        while True:
            number = connection.recv()
            connection.send(("done", job(number, lambda report: connection.send(("progress", report)))))
    except (EOFError, ConnectionError):
        return
    except Exception as error:
        with contextlib.suppress(ConnectionError):
            connection.send(("error", _sendable(error)))


def _sendable(error: Exception) -> Exception:
    """What survives a pipe: a UserError itself, of any other error its words and trace."""
    import traceback

    if isinstance(error, UserError):
        return error
    return RuntimeError("a worker failed:\n" + "".join(traceback.format_exception(error)))
