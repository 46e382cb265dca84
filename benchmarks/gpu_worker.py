"""Runs parts of a benchmark in a process of their own, which is replaced when a part hangs or takes the GPU down with it."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any


class Budget:
    """Seconds that a benchmark may take; no part is begun without some left."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds left, 0 at the least."""
        return max(0.0, self._end - time.monotonic())


class Worker:
    """A process that runs functions one after another, so that they share compiled and tuned kernels."""

    def __init__(self) -> None:
        self._process: Any = None
        self._connection: Any = None

    def call(self, function: Callable[..., Any], *arguments: Any, seconds: float = 600.0) -> Any:
        """What ``function(*arguments)`` returns there; ``{"error": why}`` if it raises, dies, or takes longer than ``seconds``."""
        if self._process is None:
            self._start()
        self._connection.send((function, arguments))
        if not self._connection.poll(seconds):
            self.stop()
            return {"error": f"did not finish in {seconds:.0f} s"}
        try:
            found, usable = self._connection.recv()
        except EOFError:
            self._process.join()
            found, usable = {"error": f"its process ended (exit code {self._process.exitcode})"}, False
        if not usable:
            self.stop()
        return found

    def stop(self) -> None:
        """Ends the process; the next call starts another."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._connection.close()
        self._process = self._connection = None

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()


def run(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns, or ``{"error": why}``; the GPU's memory is given back."""
    import torch

    try:
        return function(*arguments)
    except torch.cuda.OutOfMemoryError:
        return {"error": "out of memory"}
    except Exception as error:  # of a package that is somebody else's: told, and the next one is tried
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    finally:
        gc.collect()
        if torch.cuda.is_available():
            with contextlib.suppress(RuntimeError):
                # cuBLAS keeps 64 MB for every stream that it was called on, which every part that records CUDA graphs has anew.
                torch._C._cuda_clearCublasWorkspaces()
                torch.cuda.empty_cache()


def _serve(connection: Connection) -> None:
    import torch

    with contextlib.suppress(EOFError):  # the benchmark has ended
        while True:
            function, arguments = connection.recv()
            found = run(function, *arguments)
            usable = True
            if torch.cuda.is_available():
                gc.collect()  # what an exception held is free only now
                try:
                    torch.cuda.synchronize()
                    torch.cuda.empty_cache()
                except RuntimeError:
                    usable = False
            connection.send((found, usable))
