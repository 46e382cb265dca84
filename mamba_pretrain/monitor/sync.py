"""Uploads ``metrics.jsonl`` to Weights & Biases from a machine with internet: every step once, whatever happened to the run.

The file is the truth: it is monotonic over restarts, while W&B's own offline folders hold one piece per attempt, overlap where steps were
repeated, and cannot be joined. The run's id in ``RUN/wandb/run-id`` makes every sync, and an online run, the same W&B run.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from data_tools.errors import UserError
from mamba_pretrain.monitor.metrics import FILE_NAME, parse_line
from mamba_pretrain.monitor.sinks import flatten, run_id

Step = tuple[int, float, dict[str, Any]]  # step, time, values


class Uploader(Protocol):
    """A W&B run that is open for more history."""

    def last_step(self) -> int:
        """The last step the server has, -1 for none."""

    def log(self, step: int, time: float, values: dict[str, Any]) -> None:
        """Adds one step."""

    def finish(self) -> None:
        """Sends everything and returns when it has arrived."""


def sync_run(run_dir: Path, project: str | None = None, entity: str | None = None) -> str:
    """Sends the steps that the server does not have; returns a sentence about it. UserError without metrics or without a login."""
    path = run_dir / FILE_NAME
    if not path.is_file():
        raise UserError(f"{run_dir} has no {FILE_NAME}; nothing was trained in it yet")
    return upload(path, WandbUploader(run_dir, project, entity))


def upload(metrics: Path, uploader: Uploader) -> str:
    """Sends what is missing of a metrics file through an uploader."""
    sent, last = 0, uploader.last_step()
    try:
        for step, time, values in complete_steps(metrics):
            if step > last:
                uploader.log(step, time, values)
                sent += 1
    finally:
        uploader.finish()
    return f"sent {sent} steps" + (f" after step {last}" if last >= 0 else "") if sent else f"nothing new after step {last}"


def complete_steps(metrics: Path) -> Iterator[Step]:
    """Each step once, with the values of all its rows (train, evaluation, sample) together.

    The last step is held back while the run goes on: its evaluation may still be to come, and W&B takes no second row for a step.
    """
    current: Step | None = None
    finished = False
    with metrics.open("rb") as lines:
        for line in lines:
            row = parse_line(line)
            if row is None:  # the line being written
                continue
            finished = row["kind"] == "event" and (finished or row.get("event") == "stop")
            values = flatten(row)
            if not values:
                continue
            if current is not None and row["step"] != current[0]:
                yield current
                current = None
            current = (row["step"], row["time"], {**(current[2] if current else {}), **values})
    if current is not None and finished:
        yield current


class WandbUploader:
    """A run of the real W&B, continued by id. What it has already is asked of the server, so a sync killed halfway loses nothing."""

    def __init__(self, run_dir: Path, project: str | None, entity: str | None) -> None:
        import wandb

        config = _run_config(run_dir)
        settings = config.get("monitor", {}).get("wandb", {})
        identity = run_id(run_dir)
        try:
            self._run = wandb.init(
                id=identity,
                resume="allow",
                mode="online",
                dir=str(run_dir),
                name=config.get("name", run_dir.name),
                project=project or settings.get("project"),
                entity=entity or settings.get("entity"),
                group=settings.get("group"),
                config=config,
                settings=wandb.Settings(silent=True, disable_git=True, console="off", x_disable_stats=True),
            )
        except wandb.errors.Error as error:
            raise UserError(f"W&B cannot be reached for run {identity}: {' '.join(str(error).split())}; log in with wandb login") from error

    def last_step(self) -> int:
        """The step before the one at which a resumed run goes on, which wandb reads from the server."""
        return self._run.starting_step - 1 if self._run.resumed else -1

    def log(self, step: int, time: float, values: dict[str, Any]) -> None:
        """One history row, with the time the step was made rather than sent."""
        self._run.log({**values, "_timestamp": time}, step=step)

    def finish(self) -> None:
        """Blocks until the server has everything."""
        self._run.finish()


def _run_config(run_dir: Path) -> dict[str, Any]:
    path = run_dir / "config.yaml"
    if not path.is_file():
        return {}
    import yaml

    return yaml.safe_load(path.read_text()) or {}
