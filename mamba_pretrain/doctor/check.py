"""One finding, and the way checks are run: one that breaks or hangs is a finding too."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from data_tools.errors import UserError

Status = Literal["green", "yellow", "red", "grey"]
LATE = "run doctor again; if it hangs at the same line, end what it waits for (a network file system, a server, another process)"


@dataclass(frozen=True)
class Check:
    """``status``: green (well), yellow (training works without it; ``remedy`` says how to have it), red (training will fail or suffer;
    ``remedy`` says how to mend it) or grey (does not apply here; ``detail`` says why)."""

    name: str
    status: Status
    detail: str
    remedy: str = ""


@dataclass(frozen=True)
class Begun:
    """Said before something is checked, so that one sees what is being waited for."""

    name: str


def green(name: str, detail: str) -> Check:
    """All is well."""
    return Check(name, "green", detail)


def yellow(name: str, detail: str, remedy: str) -> Check:
    """Something is missing that training can do without."""
    return Check(name, "yellow", detail, remedy)


def grey(name: str, detail: str) -> Check:
    """Nothing to judge here."""
    return Check(name, "grey", detail)


def red(name: str, detail: str, remedy: str) -> Check:
    """Something to mend."""
    return Check(name, "red", detail, remedy)


def from_error(name: str, error: Exception) -> Check:
    """What a check raised, as its finding."""
    if isinstance(error, UserError):
        # Its sentence ends with the remedy, behind the last semicolon or colon.
        detail, _, remedy = str(error).rpartition("; " if "; " in str(error) else ": ")
        return red(name, detail or str(error), remedy)
    logging.getLogger(__name__).debug("check %s failed", name, exc_info=error)
    return red(name, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", "this check itself failed; report it with this line")


def guarded(name: str, check: Callable[[], Iterable[Check | Begun]], limit: float | None = None) -> Iterator[Check | Begun]:
    """``Begun(name)`` and the findings of ``check``; an exception inside, or ``limit`` seconds without a finding, is a red one.

    A doctor must not die of what it looks for, nor wait for it for ever: the check runs in a thread, which is left behind when it is late.
    """
    yield Begun(name)
    findings: queue.Queue[Check | Begun | None] = queue.Queue()

    def work() -> None:
        try:
            for finding in check():
                findings.put(finding)
        except Exception as error:
            findings.put(from_error(name, error))
        findings.put(None)

    threading.Thread(target=work, daemon=True, name=f"doctor: {name}").start()
    while True:
        try:
            finding = findings.get(timeout=limit)
        except queue.Empty:
            yield red(name, f"did not finish within {limit:g} s", LATE)
            return
        if finding is None:
            return
        yield finding
