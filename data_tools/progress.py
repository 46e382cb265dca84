"""Progress of a long command: a bar on a terminal, a plain line every few seconds in a log."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

SECONDS_PER_LINE = 5.0


class Progress:
    """Counts bytes of input, documents and tokens."""

    def __init__(self, title: str, total_bytes: int) -> None:
        self.title = title
        self.total = max(1, total_bytes)
        self.bytes = self.documents = self.tokens = self._before = 0
        self._began = self._printed = time.monotonic()
        self._bar: Any = None

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = [TextColumn(self.title), BarColumn(), TextColumn("{task.fields[counts]}"), TimeRemainingColumn()]
            self._bar = Bar(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task(self.title, total=self.total, counts="")
            self._bar.start()
        return self

    def skip(self, size: int, documents: int, tokens: int) -> None:
        """Counts what an earlier run did: part of the whole, but not of the rate."""
        self._before += tokens
        self.add(size, documents, tokens)

    def add(self, size: int, documents: int, tokens: int) -> None:
        """Counts work done since the last call."""
        self.bytes += size
        self.documents += documents
        self.tokens += tokens
        if self._bar is not None:
            self._bar.update(self._task, completed=self.bytes, counts=self._counts())
        elif time.monotonic() - self._printed > SECONDS_PER_LINE:
            self._printed = time.monotonic()
            left = f"  {(self.total - self.bytes) * (self._printed - self._began) / self.bytes:.0f} s left" if self.bytes else ""
            print(f"{self.title}: {self.bytes / self.total:.0%}  {self._counts()}{left}", file=sys.stderr, flush=True)

    def _counts(self) -> str:
        seconds = max(1e-9, time.monotonic() - self._began)
        if not self.documents:  # nothing is made, text is only read
            return f"{self.bytes / 1e6:,.1f} MB  {self.bytes / 1e6 / seconds:,.0f} MB/s"
        rate = (self.tokens - self._before) / seconds
        return f"{self.documents:,} documents  {self.tokens:,} tokens  {rate / 1e6:.2f}M tokens/s"

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()
        if kind is None:
            print(f"{self.title}: {self._counts()} in {time.monotonic() - self._began:.1f} s", file=sys.stderr, flush=True)
