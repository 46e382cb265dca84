"""How long a run on a Slurm cluster takes from ``submit`` to its first step, and from each kind of fault to its next step.

    python benchmarks/slurm_recovery.py [--check]

Measured on the local cluster (several slurmd on this machine): the figures hold Slurm's own waiting, the start of Python and of the ranks,
and the loading of the checkpoint of a very small model. The two minutes for which Slurm holds back a requeued job are skipped, as an
administrator can.
``--check`` reads the newest record (measuring takes about five minutes and root) and exits with 1 over the bars below.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from record import newest, record  # type: ignore[import-not-found]

from launch.chaos import newest_attempt
from launch.faults import Drill
from launch.local_cluster import LocalCluster
from launch.rehearsal import Rehearsal

NAME = "slurm_recovery"
MOST_SUBMIT_SECONDS = 60.0
MOST_RECOVERY_SECONDS = 90.0
STEPS = 400
FAULTS: dict[str, Callable[[Drill], str]] = {
    "kill -9 of a rank": Drill.kill_rank,
    "kill -9 of a rank while saving": Drill.kill_rank_in_save,
    "scontrol requeue": Drill.requeue,
    "SIGTERM (preemption)": Drill.terminate,
    "warning before the time limit": Drill.warning,
    "frozen rank (watchdog of 15 s)": Drill.freeze_rank,
    "lost node (noticed by Slurm after 5 s)": Drill.lose_node,
}


def measure() -> dict[str, float]:
    """Seconds of each of the above."""
    with tempfile.TemporaryDirectory(prefix="mamba-recovery-") as name:
        cluster = LocalCluster(Path(name) / "slurm", nodes=4).up()
        try:
            return _measure(Rehearsal(Path(name), cluster))
        finally:
            cluster.down()


def _measure(rehearsal: Rehearsal) -> dict[str, float]:
    rehearsal.make_data()
    began = time.time()
    drill = rehearsal.submit("recovery", STEPS, exit_grace=8)
    drill.wait("the first step", lambda: drill.last_step() >= 1)
    seconds = {"submit to first step": newest_attempt(drill)[1] - began}
    for name, fault in FAULTS.items():
        drill.wait_training(steps=12)  # past a checkpoint
        before = drill.starts()
        began = time.time()
        fault(drill)
        drill.wait("the next attempt", lambda before=before: drill.starts() > before, seconds=180)  # type: ignore[misc]
        drill.wait_training()
        seconds[f"{name} to next step"] = newest_attempt(drill)[1] - began
        drill.heal()
        print(f"{name}: {seconds[f'{name} to next step']:.1f} s", flush=True)
    drill.slurm.run("scancel", drill.job)
    return {key: round(value, 1) for key, value in seconds.items()}


def main() -> None:
    """The command line above."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="exit with 1 when a figure is over its bar")
    options = parser.parse_args()
    if options.check:
        seconds = newest(NAME)["seconds"]
    else:
        seconds = measure()
        print(f"recorded in {record(NAME, {'seconds': seconds})}")
    slow = []
    for name, value in seconds.items():
        bar = MOST_SUBMIT_SECONDS if name.startswith("submit") else MOST_RECOVERY_SECONDS
        print(f"{name:60} {value:6.1f} s (bar {bar:.0f} s)")
        slow += [name] if value > bar else []
    sys.exit(1 if options.check and slow else 0)


if __name__ == "__main__":
    main()
