"""The jobs of a run folder: submitting, and what became of them. ``RUN/launch/jobs.jsonl`` is the record; the folder is the handle."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_tools.errors import UserError

ATTEMPT_COLUMNS = ("time", "job", "attempt", "event", "checkpoint", "detail")
GONE_STATES = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL"}


@dataclass(frozen=True)
class Slurm:
    """Slurm's commands, of the default cluster or of the one whose slurm.conf is given."""

    conf: Path | None = None

    def run(self, *command: str, check: bool = True) -> str:
        """Output of a command, stripped; UserError with Slurm's own words if it fails."""
        if shutil.which(command[0]) is None:
            raise UserError(f"{command[0]} is not installed here; run this on a login node of the cluster, or use --dry-run")
        environment = {**os.environ, **({"SLURM_CONF": str(self.conf)} if self.conf else {})}
        # Options that a surrounding job left in the environment would be taken over by the new one.
        environment = {k: v for k, v in environment.items() if k == "SLURM_CONF" or not k.startswith(("SLURM_", "SBATCH_"))}
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        if check and result.returncode:
            raise UserError(f"{command[0]} refused: {' '.join(result.stderr.split())}")
        return result.stdout.strip()

    def sbatch(self, script: Path, *options: str) -> str:
        """Submits a script and returns the job id."""
        return self.run("sbatch", "--parsable", *options, str(script)).split(";")[0]

    def job(self, job: str) -> dict[str, str]:
        """What Slurm knows of a job, as ``scontrol show job`` names it; empty if it has forgotten the job."""
        text = self.run("scontrol", "show", "job", "-o", job, check=False)
        # Only the first line: the id of an array shows all its tasks.
        return dict(pair.split("=", 1) for pair in text.split("\n")[0].split() if "=" in pair)

    def states(self, job: str) -> list[str]:
        """States of a job's tasks that are still in the queue (one, but for arrays)."""
        return self.run("squeue", "--noheader", "--array", "--jobs", job, "--format=%T", check=False).split()


@dataclass
class Ledger:
    """``RUN/launch/jobs.jsonl`` and ``RUN/launch/attempts.tsv``."""

    run_dir: Path
    rows: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.path.exists():
            self.rows = [json.loads(line) for line in self.path.read_text().splitlines() if line.strip()]

    @property
    def path(self) -> Path:
        """The record of submitted jobs."""
        return self.run_dir / "launch" / "jobs.jsonl"

    def add(self, job: str, **details: Any) -> None:
        """Records a submitted job."""
        row = {"job": job, "time": round(time.time(), 3), **details}
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def slurm(self) -> Slurm:
        """Slurm's commands for the cluster the run was submitted to; UserError if it never was."""
        if not self.rows:
            raise UserError(f"{self.run_dir} was never submitted (no launch/jobs.jsonl); start it with mamba-pretrain submit")
        conf = next((row["slurm_conf"] for row in reversed(self.rows) if row.get("slurm_conf")), None)
        return Slurm(Path(conf) if conf else None)

    def active_jobs(self) -> dict[str, list[str]]:
        """Jobs that are pending or running, with the states of their tasks."""
        if not self.rows:
            return {}
        slurm = self.slurm()
        return {row["job"]: states for row in self.rows[-32:] if (states := [s for s in slurm.states(row["job"]) if s not in GONE_STATES])}

    def attempts(self) -> list[dict[str, str]]:
        """The history the batch script wrote: one row an event."""
        path = self.run_dir / "launch" / "attempts.tsv"
        if not path.exists():
            return []
        return [dict(zip(ATTEMPT_COLUMNS, line.split("\t"), strict=False)) for line in path.read_text().splitlines()]

    def note_submit(self, job: str) -> None:
        """Starts a new count of restarts."""
        with (self.run_dir / "launch" / "attempts.tsv").open("a") as file:
            stamp = time.strftime("%Y-%m-%dT%H:%M:%S%z")
            file.write("\t".join([stamp, job, "0", "submit", "none", ""]) + "\n")

    def ended(self) -> str | None:
        """Why the run ended for good, or None."""
        path = self.run_dir / "launch" / "ended"
        return path.read_text().strip() if path.exists() else None


def submit(slurm: Slurm, script: Path, run_dirs: Sequence[Path], chain: int = 1) -> list[str]:
    """Submits a rendered script, as a chain of jobs if asked, and records it in every run folder; returns the job ids."""
    for run_dir in run_dirs:
        (run_dir / "launch" / "ended").unlink(missing_ok=True)
    jobs: list[str] = []
    for _ in range(chain):
        jobs.append(slurm.sbatch(script, *([f"--dependency=afterany:{jobs[-1]}"] if jobs else [])))
    for index, run_dir in enumerate(run_dirs):
        ledger = Ledger(run_dir)
        for job in jobs:
            name = f"{job}_{index}" if len(run_dirs) > 1 else job
            ledger.add(name, script=str(script), **({"slurm_conf": str(slurm.conf)} if slurm.conf else {}))
        ledger.note_submit(jobs[0])
    return jobs


def status_lines(run_dir: Path) -> list[str]:
    """What ``mamba-pretrain status RUN`` prints: jobs in the queue, the last attempts, where training stands."""
    ledger = Ledger(run_dir)
    active = ledger.active_jobs() if ledger.slurm() else {}
    lines = []
    for job, states in active.items():
        details = ledger.slurm().job(job)
        place = details.get("NodeList", "(null)")
        reason = details.get("Reason", "None")
        where = f" on {place}" if place != "(null)" else f" ({reason}, starts {details.get('StartTime', 'Unknown')})"
        restarts = details.get("Restarts", "0")
        lines.append(f"job {job}: {', '.join(sorted(set(states)))}{where}, requeued {restarts} times")
    if not active:
        lines.append(f"no job in the queue; {ledger.ended() or 'the last job left no reason: see logs'}")
    lines += [
        f"  {row['time']}  attempt {row['attempt']}  {row['event']:7} {row['checkpoint']:15} {row.get('detail', '')}"
        for row in ledger.attempts()[-10:]
        if row["event"] != "submit"
    ]
    return [*lines, _progress(run_dir)]


def _progress(run_dir: Path) -> str:
    """The last training row of the metrics."""
    path = run_dir / "metrics.jsonl"
    for line in reversed(path.read_text().splitlines() if path.exists() else []):
        try:
            row = json.loads(line)
        except ValueError:  # the last line, being written
            continue
        if row.get("kind") == "train":
            ago = max(0.0, time.time() - row["time"])
            return f"step {row['step']}, loss {row['loss']:.4f}, {row.get('tokens_per_second') or 0:,.0f} tokens/s, {ago:.0f} s ago"
    return "no training step yet"


def newest_log(run_dir: Path) -> Path | None:
    """The Slurm log written to last."""
    logs = sorted((run_dir / "logs").glob("slurm-*.out"), key=lambda path: path.stat().st_mtime)
    return logs[-1] if logs else None


def follow_log(run_dir: Path, lines: int, follow: bool, poll: float = 1.0) -> Iterator[str]:
    """The last ``lines`` of the newest log, then, when following, what is added to it and to the logs of later jobs."""
    current = newest_log(run_dir)
    if current is None and not follow:
        active = Ledger(run_dir).active_jobs()
        raise UserError(f"{run_dir} has no log yet; " + (f"job {', '.join(active)} has not started" if active else "submit it first"))
    position = 0
    if current is not None:
        text = current.read_text(errors="replace")
        position = len(text.encode())
        yield "".join(text.splitlines(keepends=True)[-lines:])
    while follow:
        newest = newest_log(run_dir)
        if newest is not None and newest != current:
            current, position = newest, 0
        if current is not None:
            with current.open("rb") as file:
                file.seek(position)
                added = file.read()
            position += len(added)
            if added:
                yield added.decode(errors="replace")
        if Ledger(run_dir).ended() is not None and not Ledger(run_dir).active_jobs():
            return
        time.sleep(poll)


def cancel(run_dir: Path) -> list[str]:
    """Cancels all jobs of a run that are in the queue, followers first, and returns their ids."""
    ledger = Ledger(run_dir)
    slurm = ledger.slurm()
    jobs = list(ledger.active_jobs())
    for job in reversed(jobs):
        slurm.run("scancel", job)
    return jobs
