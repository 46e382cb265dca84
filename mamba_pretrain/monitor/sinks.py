"""Where rows go: ``metrics.jsonl`` (the truth), the console, Weights & Biases. Only the main rank has sinks."""

from __future__ import annotations

import logging
import os
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import orjson

from mamba_pretrain.monitor.config import MonitorConfig, WandbConfig
from mamba_pretrain.monitor.console import ConsoleSink
from mamba_pretrain.monitor.metrics import FILE_NAME, Row, parse_line

log = logging.getLogger(__name__)


class Sink(Protocol):
    """Takes rows of metrics."""

    def write(self, row: Row) -> None:
        """Takes one row."""

    def close(self) -> None:
        """No more rows will come."""


def build_sinks(
    config: MonitorConfig, run_dir: Path, name: str, run_config: dict[str, Any], total_steps: int, resume_step: int | None
) -> list[Sink]:
    """The sinks of the main rank.

    ``resume_step`` is the step of the checkpoint the run continues from (rows past it are dropped), or None for a run that starts anew.
    """
    truth = JsonlSink(run_dir, config.fsync_seconds)
    truth.truncate_after(resume_step or 0)
    sinks: list[Sink] = [truth]
    if config.console != "off":
        sinks.append(ConsoleSink(total_steps, config.console))
    if config.wandb.mode != "disabled":
        sinks.append(WandbSink(run_dir, config.wandb, name, run_config))
    return sinks


class JsonlSink:
    """Appends rows to ``RUN/metrics.jsonl``.

    Each row is one write of one whole line, so a crash can tear at most the last line, which the next opening drops. The file is forced to
    disk every ``fsync_seconds`` and at each row that is not a train row. Values that are not finite become null.
    """

    def __init__(self, run_dir: Path, fsync_seconds: float = 30.0) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        self.path = run_dir / FILE_NAME
        self._fsync_seconds = fsync_seconds
        self._synced_at = time.monotonic()
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        self._drop_torn_line()

    def _drop_torn_line(self) -> None:
        size = os.fstat(self._file).st_size
        tail = os.pread(self._file, min(size, 1 << 20), max(0, size - (1 << 20)))
        if tail and not tail.endswith(b"\n"):
            os.ftruncate(self._file, size - len(tail) + tail.rfind(b"\n") + 1)

    def truncate_after(self, step: int) -> None:
        """Drops every row past ``step``, so that a resumed run's steps stay monotonic. One ftruncate: there is no half-way."""
        kept = 0
        with self.path.open("rb") as lines:
            for line in lines:
                row = parse_line(line)
                if row is not None and row.get("step", 0) > step:
                    break
                kept += len(line)
        os.ftruncate(self._file, kept)
        os.fsync(self._file)

    def write(self, row: Row) -> None:
        """Appends a row. A rollback event first drops the rows it makes void."""
        if row.get("kind") == "event" and row.get("event") == "rollback":
            self.truncate_after(row["step"])
        os.write(self._file, orjson.dumps(row, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE))
        now = time.monotonic()
        if row.get("kind") != "train" or now - self._synced_at >= self._fsync_seconds:
            os.fsync(self._file)
            self._synced_at = now

    def close(self) -> None:
        """Forces the file to disk and closes it; closing twice is harmless."""
        if self._file >= 0:
            os.fsync(self._file)
            os.close(self._file)
            self._file = -1


class WandbSink:
    """Mirrors rows to Weights & Biases under one run id for all restarts; a failure there is told once and never reaches training."""

    def __init__(self, run_dir: Path, config: WandbConfig, name: str, run_config: dict[str, Any]) -> None:
        self._run: Any = None
        self._highest_step = -1
        self._guarded("start", lambda: self._start(run_dir, config, name, run_config))

    def _start(self, run_dir: Path, config: WandbConfig, name: str, run_config: dict[str, Any]) -> None:
        import wandb

        identity = run_id(run_dir)
        self._run = wandb.init(
            id=identity,
            resume="allow" if config.mode == "online" else None,
            dir=str(run_dir),
            mode=config.mode,
            name=name,
            project=config.project,
            entity=config.entity,
            group=config.group,
            tags=config.tags or None,
            notes=config.notes,
            config=run_config,
            settings=wandb.Settings(init_timeout=config.init_timeout, silent=True, disable_git=True, console="off"),
        )

    def write(self, row: Row) -> None:
        """Logs a row at its training step. W&B cannot go back: rows of steps repeated after a rollback are left to ``metrics.jsonl``."""
        if self._run is None or row["step"] < self._highest_step:
            return
        self._highest_step = row["step"]
        values = flatten(row)
        if values:
            self._guarded("log", lambda: self._run.log(values, step=row["step"]))

    def close(self) -> None:
        """Finishes the run."""
        if self._run is not None:
            self._guarded("finish", lambda: self._run.finish())
            self._run = None

    def _guarded(self, action: str, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception as error:  # whatever W&B raises, training goes on: metrics.jsonl has every row
            self._run = None
            log.warning("W&B: %s failed (%s); training goes on, metrics.jsonl has every row", action, error)


def flatten(row: Row) -> dict[str, Any]:
    """A row as W&B keys: ``train/loss``, ``eval/NAME/loss``, ``sample/text``; events other than numbers have no curve."""
    kind = row["kind"]
    if kind == "sample":
        return {"sample/text": f"{row['prompt']}{row['text']}"}
    if kind == "layers":
        return {f"layers/{key}/{i}": value for key, values in row["stats"].items() for i, value in enumerate(values) if value is not None}
    prefix = f"eval/{row['name']}" if kind == "eval" else kind if kind == "train" else f"event/{row['event']}"
    left_out = {"kind", "step", "time", "name", "event"}
    return {
        f"{prefix}/{key}": value
        for key, value in row.items()
        if key not in left_out and isinstance(value, int | float) and value is not None
    }


def run_id(run_dir: Path) -> str:
    """The tracker's id of this run folder, made once: restarts and a later sync continue the same W&B run."""
    path = run_dir / "wandb" / "run-id"
    if path.exists() and (known := path.read_text().strip()):
        return known
    path.parent.mkdir(parents=True, exist_ok=True)
    identity = uuid.uuid4().hex[:12]
    temporary = path.with_suffix(".tmp")
    temporary.write_text(identity + "\n")
    temporary.replace(path)
    return identity
