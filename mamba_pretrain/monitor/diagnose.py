"""What a run folder says about hangs, stragglers and restarts: the analysis behind ``mamba-pretrain diagnose RUN``."""

from __future__ import annotations

import csv
import json
import statistics
from dataclasses import dataclass
from pathlib import Path

from mamba_pretrain.monitor import heartbeat

STRAGGLER_RATIO = 1.3  # slower than the median rank by this factor
RECENT_ROWS = 30


@dataclass(frozen=True)
class RankSpeed:
    """Mean seconds a step of one rank over its recent steps: the whole step, and the part it computed itself."""

    rank: int
    node: str
    steps: int
    step_seconds: float
    compute_seconds: float


def rank_speeds(run_dir: Path, recent_rows: int = RECENT_ROWS) -> list[RankSpeed]:
    """Speeds of all ranks that wrote ``logs/steps-R.csv``, by rank."""
    nodes = {beat.rank: beat.node for beat in heartbeat.read_all(run_dir)}
    speeds = []
    for path in (run_dir / "logs").glob("steps-*.csv"):
        with path.open() as file:
            rows = list(csv.DictReader(file))[-recent_rows:]
        steps = sum(int(row["steps"]) for row in rows)
        if not steps:
            continue
        means = [sum(float(row[key]) * int(row["steps"]) for row in rows) / steps for key in ("step_seconds", "compute_seconds")]
        rank = int(path.stem.removeprefix("steps-"))
        speeds.append(RankSpeed(rank, nodes.get(rank, "?"), steps, *means))
    return sorted(speeds, key=lambda speed: speed.rank)


def stragglers(speeds: list[RankSpeed], ratio: float = STRAGGLER_RATIO) -> list[RankSpeed]:
    """Ranks whose own computing takes more than ``ratio`` times the median of the others', slowest first."""
    found = []
    for speed in speeds:
        others = [other.compute_seconds for other in speeds if other.rank != speed.rank]
        if others and speed.compute_seconds > ratio * statistics.median(others):
            found.append(speed)
    return sorted(found, key=lambda speed: -speed.compute_seconds)


def straggler_report(run_dir: Path) -> list[str]:
    """Lines that name the slowest rank and every straggler, with its node."""
    speeds = rank_speeds(run_dir)
    if not speeds:
        return ["stragglers: no step times yet (logs/steps-RANK.csv)"]
    median = statistics.median(speed.compute_seconds for speed in speeds)
    slowest = max(speeds, key=lambda speed: speed.compute_seconds)
    lines = [
        f"ranks: {len(speeds)}; a step takes {statistics.median(s.step_seconds for s in speeds):.3f} s, of which the median rank computes "
        f"{median:.3f} s; slowest is rank {slowest.rank} on {slowest.node} with {slowest.compute_seconds:.3f} s"
    ]
    found = stragglers(speeds)
    for speed in found:
        others = statistics.median(other.compute_seconds for other in speeds if other.rank != speed.rank)
        lines.append(
            f"straggler: rank {speed.rank} on node {speed.node} computes {speed.compute_seconds / others:.1f}x as long as the others"
        )
    if not found:
        lines.append(f"stragglers: none (no rank computes more than {STRAGGLER_RATIO}x as long as the others)")
    return lines


def hang_report(run_dir: Path) -> list[str]:
    """Lines about the last hang, if there was one: who, where, since when, and where the other ranks stood."""
    path = run_dir / "hang.json"
    if not path.exists():
        return ["hangs: none reported"]
    report = json.loads(path.read_text())
    lines = [f"last hang: {report['sentence']}", *(f"    {line}" for line in report["stack"][-8:])]
    for place in report["ranks"]:
        lines.append(
            f"  rank {place['rank']} on {place['node']}: step {place['step']}, {place['phase']}, {place['where'] or 'unknown line'}"
        )
    lines += [f"  stacks: {path}" for path in sorted((run_dir / "logs").glob("stack-rank-*.txt")) if path.stat().st_size]
    lines += [f"  NCCL flight recorder: {path}" for path in sorted((run_dir / "logs").glob("nccl-trace-rank-*"))]
    return lines


def liveness_report(run_dir: Path, stale_after: float = 60.0) -> list[str]:
    """Lines about ranks whose heartbeat stopped without saying goodbye."""
    beats = heartbeat.read_all(run_dir)
    silent = [beat for beat in beats if beat.state != "stopped" and beat.age > stale_after]
    if not beats:
        return ["heartbeats: none yet"]
    lines = [f"heartbeats: {len(beats)} ranks on {len({beat.node for beat in beats})} nodes; last step {max(b.step for b in beats)}"]
    return lines + [
        f"silent: rank {b.rank} on node {b.node} for {b.age:.0f} s, last at step {b.step} in {b.phase}: {b.where}" for b in silent
    ]
