"""One finding, and the way checks are run: a check that breaks is a finding too."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from data_tools.errors import UserError

Status = Literal["green", "red", "grey"]


@dataclass(frozen=True)
class Check:
    """``status``: green (well), red (to be mended; ``remedy`` says how) or grey (does not apply here; ``detail`` says why)."""

    name: str
    status: Status
    detail: str
    remedy: str = ""


def green(name: str, detail: str) -> Check:
    """All is well."""
    return Check(name, "green", detail)


def grey(name: str, detail: str) -> Check:
    """Nothing to judge here."""
    return Check(name, "grey", detail)


def red(name: str, detail: str, remedy: str) -> Check:
    """Something to mend."""
    return Check(name, "red", detail, remedy)


def guarded(name: str, check: Callable[[], Iterable[Check]]) -> list[Check]:
    """The findings of ``check``; an exception inside becomes a red finding, because a doctor must not die of what it looks for."""
    try:
        return list(check())
    except UserError as error:
        # Its sentence ends with the remedy, behind the last semicolon or colon.
        detail, _, remedy = str(error).rpartition("; " if "; " in str(error) else ": ")
        return [red(name, detail or str(error), remedy)]
    except Exception as error:
        logging.getLogger(__name__).debug("check %s failed", name, exc_info=True)
        return [
            red(name, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", "this check itself failed; report it with this line")
        ]
