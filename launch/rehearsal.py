"""Real trainings on a local Slurm cluster, started by the real commands: for end-to-end tests, the chaos run and the recovery benchmark."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import yaml

from launch.faults import Drill
from launch.jobs import Ledger
from launch.local_cluster import LocalCluster

REPOSITORY = Path(__file__).resolve().parents[1]
CONFIG = REPOSITORY / "configs" / "quickstart.yaml"
PROFILE = REPOSITORY / "configs" / "cluster" / "local.yaml"

# A model small enough to take ten steps a second on a shared core, with a checkpoint every few steps.
SMALL = {
    "model.d_model": 64,
    "model.n_layer": 2,
    "model.vocab_size": 512,
    "data.sequence_length": 64,
    "train.global_batch_size": 8,
    "train.micro_batch_size": 4,
    "checkpoint.every_steps": 10,
    "evaluation.every_steps": "null",
    "evaluation.at_end": "false",
    "evaluation.prompts": "[]",
    "monitor.log_every": 1,
    "train.hang_timeout": 15,
}


class Rehearsal:
    """A folder with a dataset, a running cluster, and the runs that are submitted to it.

    ``as_shipped``: with the quickstart's own model and dataset instead of a small model and this repository's source.
    """

    def __init__(self, folder: Path, cluster: LocalCluster, as_shipped: bool = False) -> None:
        self.folder = folder
        self.cluster = cluster
        self.data = folder / "data"
        self.as_shipped = as_shipped

    def make_data(self) -> None:
        """The source of this repository takes about a second, the quickstart's text about ten."""
        if (self.data / "manifest.json").exists():
            return
        if self.as_shipped:
            self._python("mamba_pretrain", "quickstart", "--data-only", "--folder", str(self.folder))
            return
        text = [str(REPOSITORY / "mamba_pretrain"), "--include", "**/*.py"]
        tokenizer = str(self.folder / "tokenizer")
        self._python("data_tools", "train-tokenizer", *text, "--output", tokenizer, "--vocab-size", "512")
        self._python("data_tools", "tokenize", *text, "--tokenizer", tokenizer, "--output", str(self.data), "--validation-fraction", "0.05")

    def profile(self, **keys: object) -> Path:
        """The local profile for this cluster, with some keys changed; ``health`` is off unless asked for."""
        tree = yaml.safe_load(PROFILE.read_text())
        tree |= {"slurm_conf": str(self.cluster.conf), "health": {**tree["health"], "enabled": False}, **keys}
        path = self.folder / f"cluster-{abs(hash(json.dumps(keys, sort_keys=True, default=str))):x}.yaml"
        path.write_text(yaml.safe_dump(tree))
        return path

    def submit(self, name: str, steps: int, settings: dict[str, object] | None = None, nodes: int = 2, **keys: object) -> Drill:
        """``mamba-pretrain submit``: a run of so many steps in ``folder/name``."""
        run_dir = self.folder / name
        changes = {
            "name": name,
            "run_dir": run_dir,
            "data.sources": f"[{{path: {self.data}}}]",
            "train.steps": steps,
            **({} if self.as_shipped else SMALL),
            **(settings or {}),
        }
        overrides = [f"{key}={value}" for key, value in changes.items()]
        self._python("mamba_pretrain", "submit", str(CONFIG), "--cluster", str(self.profile(**keys)), "--nodes", str(nodes), *overrides)
        return Drill(self.cluster, run_dir, Ledger(run_dir).rows[-1]["job"], random.Random(name))

    def undisturbed(self, steps: int, settings: dict[str, object] | None = None, nodes: int = 2, name: str = "undisturbed") -> Drill:
        """The same training without faults, to the end."""
        drill = self.submit(name, steps, settings, nodes)
        drill.wait_end(seconds=120 + steps)
        return drill

    def _python(self, *arguments: str) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        result = subprocess.run([sys.executable, "-m", *arguments], cwd=REPOSITORY, env=environment, capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(
                f"{' '.join(arguments[:2])} failed with exit code {result.returncode}: {(result.stderr + result.stdout)[-3000:]}"
            )
