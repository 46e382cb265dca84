"""Stands in for ``mamba_pretrain train`` in tests of the batch script: counts steps, saves, obeys signals; starts in a blink.

The config is a few ``key: value`` lines: steps, seconds (a step), save_every, and faults such as ``exit_code: 2`` or ``crash_at: 5``.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

config = dict(line.split(": ") for line in Path(sys.argv[-1]).read_text().splitlines())
run = Path(sys.argv[-1]).parents[1]
rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))
latest = run / "checkpoints" / "latest"
stop = False


def on_signal(number: int, frame: object) -> None:
    global stop
    stop = True


def save(step: int) -> None:
    if rank == 0:
        latest.parent.mkdir(exist_ok=True)
        temporary = latest.with_name(".latest")
        temporary.write_text(f"step-{step:08d}")
        temporary.replace(latest)


for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, on_signal)
step = int(latest.read_text().removeprefix("step-")) if latest.exists() else 0
facts = {"rank": rank, "node": os.environ["SLURMD_NODENAME"], "from": step, "time": time.time()}
names = ("MASTER_ADDR", "MASTER_PORT", "SLURM_NTASKS", "SLURM_JOB_ID", "SLURM_RESTART_COUNT")
facts |= {name: os.environ.get(name) for name in names}
with (run / f"started-{rank}.jsonl").open("a") as file:
    file.write(json.dumps(facts) + "\n")
if "exit_code" in config:
    sys.exit(int(config["exit_code"]))
stop_file = Path(os.environ["MAMBA_PRETRAIN_STOP_FILE"])
while step < int(config["steps"]):
    time.sleep(float(config["seconds"]))
    step += 1
    if step == int(config.get("crash_at", -1)):
        os.kill(os.getpid(), signal.SIGKILL)
    if stop or stop_file.exists():
        save(step)
        sys.exit(85)
    if step % int(config["save_every"]) == 0:
        save(step)
save(step)
