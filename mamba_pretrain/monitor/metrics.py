"""Reads ``metrics.jsonl``, the truth about a run, also while another process writes it."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from data_tools.errors import UserError

FILE_NAME = "metrics.jsonl"
Row = dict[str, Any]
KINDS = {"train": "train", "eval": "evals", "event": "events", "sample": "samples", "layers": "layers"}


@dataclass
class History:
    """The rows of a run by kind, in the order of the file."""

    train: list[Row] = field(default_factory=list)
    evals: list[Row] = field(default_factory=list)
    events: list[Row] = field(default_factory=list)
    samples: list[Row] = field(default_factory=list)
    layers: list[Row] = field(default_factory=list)

    def add(self, row: Row) -> None:
        """Files a row; kinds this version does not know are passed over."""
        name = KINDS.get(row.get("kind", ""))
        if name is not None:
            getattr(self, name).append(row)

    def column(self, key: str) -> list[float | None]:
        """One value per train row; None where a row lacks it."""
        return [row.get(key) for row in self.train]

    @property
    def last(self) -> Row | None:
        """The newest train row."""
        return self.train[-1] if self.train else None


class Tail:
    """Follows a growing file of rows.

    A row counts once its newline is there, so a half-written line is read later. When the file shrinks or is replaced (a resume drops
    the rows past its checkpoint), everything is read again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.history = History()
        self._position = 0
        self._inode = -1
        self._edge = b""

    def poll(self) -> bool:
        """Reads what is new; True when the history changed."""
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            return False
        with file:
            status = os.fstat(file.fileno())
            if status.st_ino != self._inode or status.st_size < self._position or not self._same_edge(file):
                self.history, self._position, self._inode = History(), 0, status.st_ino
            file.seek(self._position)
            data = file.read()
        end = data.rfind(b"\n") + 1
        for line in data[:end].splitlines():
            row = parse_line(line)
            if row is not None:
                self.history.add(row)
        if end:
            self._edge = data[max(0, end - 64) : end]
        self._position += end
        return end > 0

    def _same_edge(self, file: Any) -> bool:
        """Whether the bytes before the position are still those read last: a file cut and grown again between two polls is noticed."""
        file.seek(self._position - len(self._edge))
        return self._position == 0 or file.read(len(self._edge)) == self._edge


def parse_line(line: bytes) -> Row | None:
    """A row, or None for a line that is not a JSON object (torn by a crash)."""
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    return row if isinstance(row, dict) else None


def read_history(run_dir: str | Path) -> History:
    """All rows of a run. Raises UserError if the folder is no run."""
    path = metrics_path(run_dir)
    tail = Tail(path)
    tail.poll()
    return tail.history


def metrics_path(run_dir: str | Path) -> Path:
    """The metrics file of a run folder that has one, else UserError."""
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise UserError(f"run folder {run_dir} does not exist; pass the folder that training printed, for example runs/quickstart")
    path = run_dir / FILE_NAME
    if not path.is_file():
        raise UserError(f"{run_dir} is not a run folder: it holds no {FILE_NAME}; pass the folder named run_dir in the config")
    return path
