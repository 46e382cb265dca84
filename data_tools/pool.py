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


class Pool:
    """``workers`` spawned processes; with one worker everything happens in this process. A context manager.

    The processes start at once and call ``warm_up(argument)``, while this one gets on with its own preparations.
    """

    def __init__(self, workers: int, warm_up: Callable[[Any], None] | None = None, argument: Any = None) -> None:
        self.workers: dict[Connection, BaseProcess] = {}
        context = multiprocessing.get_context("spawn")  # a forked process would inherit the tokenizer libraries' threads in unknown states
        for _ in range(workers if workers > 1 else 0):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, warm_up, argument), daemon=True)
            process.start()
            theirs.close()  # so that the end of the worker is the end of the pipe
            self.workers[ours] = process

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *error: object) -> None:
        """Ends the workers, in the middle of a job too: jobs leave nothing but temporary files."""
        for connection, process in self.workers.items():
            connection.close()
            process.terminate()
        for process in self.workers.values():
            process.join()

    def run(self, numbers: Sequence[int], open_job: Callable[[Any], Job], payload: Any, report: Report) -> Iterator[tuple[int, Any]]:
        """Yields ``(number, result)`` as jobs end; ``report`` is called here with what they report on the way.

        ``open_job(payload)`` is called once in each process and must be importable. An exception in a job is raised here; so is the death of a
        process, as UserError. Then leave the pool: other jobs may still be running.
        """
        if not numbers:
            return
        if not self.workers:
            job = open_job(payload)
            yield from ((number, job(number, report)) for number in numbers)
            return
        waiting, running = list(reversed(numbers)), dict[Connection, int]()
        for connection in self.workers:
            with contextlib.suppress(ConnectionError):
                connection.send(("open", open_job, payload))
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
                connection.send(("do", running[connection]))

    def _lost(self, connection: Connection) -> UserError:
        process = self.workers[connection]
        process.join(10)
        code = process.exitcode
        how = f"was killed by signal {-code} ({signal.Signals(-code).name})" if code is not None and code < 0 else f"ended with code {code}"
        return UserError(
            f"a worker process {how}, for want of memory perhaps; finished work is kept: the same command continues, --workers sets how many"
        )


def _work(connection: Connection, warm_up: Callable[[Any], None] | None, argument: Any) -> None:
    """A worker's life. When the parent dies the pipe breaks at the next report, and the worker ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is told by the same key press, and ends the workers
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if warm_up is not None:
        with contextlib.suppress(Exception):  # what is wrong will show again in earnest
            warm_up(argument)
    job: Job | None = None
    try:
        while True:
            what, *rest = connection.recv()
            if what == "open":
                job = rest[0](rest[1])
            elif job is not None:
                connection.send(("done", job(rest[0], lambda report: connection.send(("progress", report)))))
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
