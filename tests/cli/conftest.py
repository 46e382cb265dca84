"""A tiny dataset and config, and ways to run the command line in processes of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

CONFIG = """
name: tiny
run_dir: {run_dir}
seed: 3
model: {{mixer: mamba1, vocab_size: 512, d_model: 32, n_layer: 2, d_state: 8}}
data: {{sources: [{{path: {data}}}], sequence_length: 64}}
optim: {{lr: 3.0e-3, schedule: {{warmup_fraction: 0.1}}}}
train: {{steps: 40, global_batch_size: 4, micro_batch_size: 1}}
precision: {{compute: fp32}}
checkpoint: {{every_steps: 10}}
evaluation: {{at_end: false}}
monitor: {{log_every: 1, wandb: {{mode: disabled}}}}
"""


def environment() -> dict[str, str]:
    """One thread per process: several share two cores, and sums then have one order."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONUNBUFFERED": "1"}


@dataclass
class Workspace:
    """A folder with a dataset and a config; runs commands in it."""

    root: Path

    @property
    def data(self) -> Path:
        return self.root / "data"

    def config(self, run: str) -> Path:
        path = self.root / f"{run}.yaml"
        path.write_text(CONFIG.format(run_dir=self.root / run, data=self.data))
        return path

    def command(self, run: str, *overrides: str, processes: int = 1) -> list[str]:
        launcher = [sys.executable]
        if processes > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        return [*launcher, "-m", "mamba_pretrain", "train", str(self.config(run)), *overrides]

    def train(self, run: str, *overrides: str, processes: int = 1) -> subprocess.CompletedProcess[str]:
        return run_command(self.command(run, *overrides, processes=processes))

    def start(self, run: str, *overrides: str, processes: int = 1) -> subprocess.Popen[bytes]:
        """In the background, as the leader of a process group."""
        command = self.command(run, *overrides, processes=processes)
        return subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)

    def rows(self, run: str, kind: str = "train") -> list[dict]:
        lines = (self.root / run / "metrics.jsonl").read_text().splitlines()
        return [row for row in map(json.loads, lines) if row["kind"] == kind]

    def losses(self, run: str) -> list[float]:
        return [row["loss"] for row in self.rows(run)]


def run_command(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=300, check=False)


@pytest.fixture(scope="session")
def cli():
    """Runs ``mamba-pretrain`` (or ``mamba-data``) with arguments; returns the completed process."""

    def run(*arguments: object, module: str = "mamba_pretrain") -> subprocess.CompletedProcess[str]:
        return run_command([sys.executable, "-m", module, *map(str, arguments)])

    return run


@pytest.fixture(scope="session")
def workspace(tmp_path_factory, cli) -> Workspace:
    """Real text (this project's own documentation and code) tokenized into a dataset."""
    root = tmp_path_factory.mktemp("workspace")
    repository = Path(__file__).parents[2]
    text = [repository, "--include", "mamba_pretrain/**/*.py", "--include", "docs/*.md"]
    for arguments in (
        ["train-tokenizer", *text, "--output", root / "tokenizer", "--vocab-size", "512"],
        ["tokenize", *text, "--tokenizer", root / "tokenizer", "--output", root / "data", "--validation-fraction", "0.1"],
    ):
        result = cli(*arguments, module="data_tools")
        assert result.returncode == 0, result.stderr
    return Workspace(root)
