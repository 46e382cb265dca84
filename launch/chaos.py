"""Twenty random faults in one training on a local Slurm cluster; afterwards nothing may be missing.

    python -m launch.chaos [--faults 20] [--seed 0] [--folder DIR] [--keep]

Passes when the run finishes, its losses equal an undisturbed run's bit for bit, every restart continued from the last complete checkpoint,
every step is in the metrics exactly once and in order, and one W&B run id served all attempts.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launch.faults import Drill, differences
from launch.jobs import Ledger
from launch.local_cluster import LocalCluster
from launch.rehearsal import Rehearsal

STEPS_PER_FAULT = 20
FAULTS: dict[str, Callable[[Drill], str]] = {
    "warning": Drill.warning,
    "requeue": Drill.requeue,
    "terminate": Drill.terminate,
    "kill": Drill.kill_rank,
    "kill in save": Drill.kill_rank_in_save,
    "freeze": Drill.freeze_rank,
    "lose node": Drill.lose_node,
}


def main() -> None:
    """The command line above; exits with 1 and the reasons when something was lost."""
    parser = argparse.ArgumentParser(prog="python -m launch.chaos")
    parser.add_argument("--faults", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=None, help="default: a temporary folder")
    parser.add_argument("--keep", action="store_true", help="leave the folder for a look")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="mamba-chaos-"))
    folder.mkdir(parents=True, exist_ok=True)
    cluster = LocalCluster(folder / "slurm", nodes=4).up()
    try:
        problems = run_chaos(Rehearsal(folder, cluster), options.faults, options.seed)
    finally:
        cluster.down()
    if not options.keep:
        shutil.rmtree(folder, ignore_errors=True)
    print("\n".join(["chaos: FAILED", *problems]) if problems else "chaos: passed", flush=True)
    sys.exit(1 if problems else 0)


def run_chaos(rehearsal: Rehearsal, faults: int, seed: int) -> list[str]:
    """Trains undisturbed, trains under faults, compares; returns what is wrong, nothing if all is well."""
    steps = faults * STEPS_PER_FAULT
    rehearsal.make_data()
    print(f"chaos: {steps} steps undisturbed ...", flush=True)
    undisturbed = rehearsal.undisturbed(steps)
    restart = {"mode": "requeue", "max_restarts": 4 * faults, "crash_loop": 8}
    drill = rehearsal.submit("chaos", steps, restart=restart, exit_grace=8)
    resumes = hurt_repeatedly(drill, faults, random.Random(seed))
    drill.wait_end(seconds=300 + steps)
    return [*findings(drill, undisturbed), *resumes]


def hurt_repeatedly(drill: Drill, faults: int, choice: random.Random) -> list[str]:
    """One fault after the other, each as soon as training moves again; returns restarts that did not continue from the last checkpoint."""
    names = [name for _ in range(faults // len(FAULTS) + 1) for name in choice.sample(list(FAULTS), len(FAULTS))][:faults]
    problems: list[str] = []
    for number, name in enumerate(names, 1):
        drill.wait_training(steps=choice.randint(2, 12))
        if Ledger(drill.run_dir).ended():
            return [*problems, f"the run ended before fault {number}"]
        began, before = time.time(), drill.starts()
        did = FAULTS[name](drill)
        drill.wait("the next attempt", lambda before=before: drill.starts() > before, seconds=180)  # type: ignore[misc]
        standing = Ledger(drill.run_dir).attempts()[-1]["checkpoint"]
        drill.wait_training()
        drill.heal()
        resumed, moment = newest_attempt(drill)
        if resumed != step_of(standing):
            problems.append(f"fault {number} ({did}): resumed at step {resumed}, the last checkpoint was {standing}")
        print(f"chaos: {number:2} {did:55} resumed at step {resumed:4} after {moment - began:5.1f} s", flush=True)
    return problems


def step_of(checkpoint: str) -> int:
    """``step-00000120`` is 120; no checkpoint is 0."""
    return int(checkpoint.rpartition("-")[2]) if checkpoint.startswith("step-") else 0


def newest_attempt(drill: Drill) -> tuple[int, float]:
    """The step from which the attempt that trains now went on, and when it made its first step."""
    rows = [row for row in drill.rows() if row["kind"] == "train"]
    newest = max(row["restart"] for row in rows)
    first = next(row for row in rows if row["restart"] == newest)
    return first["step"] - 1, first["time"]


def findings(drill: Drill, undisturbed: Drill) -> list[str]:
    """What the finished run lost, if anything."""
    problems = []
    rows = drill.rows()
    steps = [row["step"] for row in rows if row["kind"] == "train"]
    if steps != list(range(1, len(steps) + 1)):
        problems.append(f"steps in metrics.jsonl are not 1..{len(steps)}, each once and in order")
    difference = differences(rows, undisturbed.rows())
    if difference:
        problems.append(difference)
    torn = [line for line in (drill.run_dir / "metrics.jsonl").read_text().splitlines() if not _is_json(line)]
    if torn:
        problems.append(f"torn lines in metrics.jsonl: {torn[0][:80]}")
    identities = {path.name.rpartition("-")[2] for path in (drill.run_dir / "wandb").glob("*run-*-*") if path.is_dir()}
    expected = (drill.run_dir / "wandb" / "run-id").read_text().strip() if (drill.run_dir / "wandb" / "run-id").exists() else None
    if expected is None or identities - {expected}:
        problems.append(f"W&B run ids {sorted(identities)}, expected only {expected}")
    return problems


def _is_json(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


if __name__ == "__main__":
    main()
