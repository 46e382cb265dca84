"""Kills training processes with SIGKILL at random instants while they save, and checks that nothing is lost.

Each round trains a tiny model that saves at every step, in the background. One process or all are killed at a random instant; the processes are
started again and continue from the last complete checkpoint, until the run is finished. The losses must be those of a run that nobody disturbed,
bit for bit, and no process may hang. `--check` exits 1 unless that holds; `--kills N` sets the number of kills.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from engine_worker import Job, build, my_batches

STEPS = 12
PATIENCE = 60.0  # seconds in which every process must have ended, killed or not


def live(rank: int, world: int, port: int, engine_name: str, folder: str) -> None:
    """One life of a process: continues from the last checkpoint, appends each step's loss to a file, saves after every step."""
    place = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world,
        "LOCAL_WORLD_SIZE": world,
        "MASTER_PORT": port,
        "MASTER_ADDR": "127.0.0.1",
    }
    os.environ.update({key: str(value) for key, value in place.items()})
    log = os.open(f"{folder}/rank-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    import torch

    from mamba_pretrain.checkpoint.config import CheckpointConfig
    from mamba_pretrain.checkpoint.store import CheckpointStore
    from mamba_pretrain.parallel import topology as ranks
    from mamba_pretrain.parallel.config import ParallelConfig
    from mamba_pretrain.training.step import train_step

    torch.set_num_threads(1)
    topology = ranks.initialize(ParallelConfig(strategy=engine_name, timeout_minutes=1.0))  # type: ignore[arg-type]
    engine, _, _ = build(Job("kill", engine_name, micro=12 // world), topology)
    store = CheckpointStore(Path(folder) / "checkpoints", CheckpointConfig(keep_last=2, timeout=20.0), topology)
    checkpoint = store.open()
    if checkpoint is not None:
        engine.load(checkpoint.reader)
    with open(f"{folder}/losses.jsonl", "a") as losses:
        for step in range(checkpoint.step if checkpoint else 0, STEPS):
            found = train_step(engine, my_batches(step, topology, 12 // world), 1e-2, 0.5)
            if rank == 0:
                losses.write(json.dumps([step, float(found.loss).hex()]) + "\n")
                losses.flush()
            store.save(engine, step + 1, {})
        store.wait()
    ranks.shutdown()


class Runner:
    """Starts lives from a server that has imported everything already, so that a life costs a second and not ten."""

    def __init__(self, engine: str, world: int, root: Path) -> None:
        self.engine, self.world, self.root = engine, world, root
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(
            ["torch", "engine_worker", "mamba_pretrain.parallel.torch_engine", "mamba_pretrain.checkpoint.store"]
        )

    def start(self, folder: Path) -> list[Any]:
        """All processes of one life."""
        folder.mkdir(parents=True, exist_ok=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        processes = [
            self._context.Process(target=live, args=(rank, self.world, port, self.engine, str(folder)), daemon=True)
            for rank in range(self.world)
        ]
        for process in processes:
            process.start()
        return processes

    def undisturbed(self) -> list[str]:
        """Losses of a run without kills."""
        wait_all(self.start(self.root / "undisturbed"))
        return losses_of(self.root / "undisturbed")

    def disturbed(self, kills: int, choose: random.Random) -> tuple[list[str], int]:
        """Losses of a run that is killed ``kills`` times, and how many kills came while a save was under way."""
        folder, during = self.root / "disturbed", 0
        for number in range(kills):
            if finished(folder):  # begin again: there are kills left
                shutil.rmtree(folder)
            processes = self.start(folder)
            # All are killed at once, or one only, whose peers must notice.
            victims = processes if number % 2 else [choose.choice(processes)]
            wait_for_steps(folder, steps_done(folder) + choose.randint(1, 4), processes)
            time.sleep(choose.uniform(0.0, 0.1))
            during += save_under_way(folder, processes)
            for process in victims:
                process.kill()
            wait_all(processes)
        wait_all(self.start(folder))
        return losses_of(folder), during


def steps_done(folder: Path) -> int:
    """Lines in the file of losses."""
    path = folder / "losses.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def wait_for_steps(folder: Path, steps: int, processes: list[Any]) -> None:
    """Until so many steps are done, or the processes have ended."""
    deadline = time.monotonic() + PATIENCE
    while steps_done(folder) < steps and any(process.is_alive() for process in processes) and time.monotonic() < deadline:
        time.sleep(0.002)


def save_under_way(folder: Path, processes: list[Any]) -> bool:
    """Waits for the next save to begin; False if the processes ended first."""
    deadline = time.monotonic() + PATIENCE
    while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
        if any((folder / "checkpoints").glob(".tmp-*")):
            return True
    return False


def wait_all(processes: list[Any]) -> None:
    """Until every process has ended by itself. Raises TimeoutError if one hangs."""
    deadline = time.monotonic() + PATIENCE
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    if hanging := [process for process in processes if process.is_alive()]:
        for process in hanging:
            process.kill()
        raise TimeoutError(f"{len(hanging)} of {len(processes)} processes hang {PATIENCE:g} s after a kill")


def finished(folder: Path) -> bool:
    """Whether the run has saved its last step."""
    return (folder / "checkpoints" / f"step-{STEPS:08d}").exists()


def losses_of(folder: Path) -> list[str]:
    """The loss of each step, exact; a step done twice must have had the same loss both times."""
    losses: dict[int, str] = {}
    for line in (folder / "losses.jsonl").read_text().splitlines():
        try:
            step, loss = json.loads(line)
        except ValueError:
            continue  # the line that was being written when its process was killed
        if losses.setdefault(step, loss) != loss:
            raise AssertionError(f"step {step} had loss {losses[step]} and, after a resume, {loss}")
    return [losses[step] for step in range(STEPS)]


def torture(engine: str, world: int, kills: int, root: Path, seed: int = 0) -> dict[str, Any]:
    """Kills a run and reports whether its losses stayed those of an undisturbed one."""
    runner = Runner(engine, world, root)
    expected = runner.undisturbed()
    found, during = runner.disturbed(kills, random.Random(seed))
    return {
        "engine": engine,
        "world_size": world,
        "kills": kills,
        "kills_during_a_save": during,
        "identical": found == expected,
    }


def main() -> int:
    """Runs, prints, records; 1 if a loss differs."""
    from record import record

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit 1 unless every run kept its losses")
    parser.add_argument("--kills", type=int, default=50, help="kills in all")
    arguments = parser.parse_args()
    runs = []
    for engine, world, kills in (("single", 1, arguments.kills // 5), ("fsdp2", 2, arguments.kills - arguments.kills // 5)):
        with tempfile.TemporaryDirectory() as folder:
            runs.append(torture(engine, world, kills, Path(folder)))
        print(
            "{engine} x{world_size}: {kills} kills, {kills_during_a_save} of them during a save, losses identical: {identical}".format(
                **runs[-1]
            ),
            flush=True,
        )
    print("recorded", record("kill_saves", {"runs": runs}))
    return int(arguments.check and not all(run["identical"] for run in runs))


if __name__ == "__main__":
    sys.exit(main())
