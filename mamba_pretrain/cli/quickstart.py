"""``mamba-pretrain quickstart``: the whole way from text to a Hugging Face model, through the commands a user would type."""

from __future__ import annotations

import shlex
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import typer

from data_tools.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[2]


def quickstart(
    folder: Path = typer.Option(Path("runs/quickstart"), help="Everything is written here"),
    processes: int = typer.Option(2, min=1, help="Training processes on a CPU; on GPUs one per GPU"),
    steps: int = typer.Option(120, min=20, help="Training steps"),
    data_only: bool = typer.Option(False, help="Stop when the dataset is ready, for train or submit with configs/quickstart.yaml"),
    overwrite: bool = typer.Option(False, help="Start again in a folder that already holds a quickstart"),
) -> None:
    """Run the main job on the Python standard library's source: tokenizer, shards, training, resume, report, sample, export.

    Example: `mamba-pretrain quickstart --steps 100 --folder /tmp/quickstart`
    """
    Quickstart(folder, processes, steps).run(overwrite, data_only)


class Quickstart:
    """The steps in order; each prints the command it runs, so that it can be repeated by hand."""

    def __init__(self, folder: Path, processes: int, steps: int) -> None:
        self.folder = folder
        self.data = folder / "data"
        self.tokenizer = folder / "tokenizer"
        self.export = folder / "export"
        self.steps = steps
        self.processes = processes
        self._began = time.monotonic()
        self._number = 0

    def run(self, overwrite: bool, data_only: bool) -> None:
        """All steps, or those of the data; stops at the first that fails, with its exit code."""
        if self.folder.exists() and any(self.folder.iterdir()):
            if not overwrite:
                raise UserError(f"{self.folder} already holds files; pass --overwrite to start again, or another --folder")
            self._clear()
        self._prepare_data()
        if data_only:
            print(f"\nThe dataset is ready: {self.data}", flush=True)
            return
        self._train_with_an_interruption()
        self._use()
        print(
            f"\nDone in {time.monotonic() - self._began:.0f} s. Report: {self.folder / 'report.html'}  Model for transformers: {self.export}",
            flush=True,
        )

    def _clear(self) -> None:
        import shutil

        known = {"config.yaml", "data", "tokenizer", "checkpoints", "metrics.jsonl", "export"}
        strangers = [
            path.name
            for path in self.folder.iterdir()
            if path.name not in known | {"logs", "report.html", "heartbeat", "launch", "wandb", "figures"}
        ]
        if strangers:
            raise UserError(f"{self.folder} holds {strangers[0]!r}, which no quickstart wrote; choose another --folder")
        shutil.rmtree(self.folder)

    def _prepare_data(self) -> None:
        stdlib = sysconfig.get_paths()["stdlib"]
        text = [stdlib, "--include", "**/*.py"]
        for tests in ("**/test/**", "**/tests/**", "**/idlelib/idle_test/**", "**/site-packages/**", "**/lib2to3/tests/**"):
            text += ["--exclude", tests]
        self._step("Train a SentencePiece tokenizer on the standard library's source files")
        self._data("train-tokenizer", *text, "--output", self.tokenizer, "--vocab-size", "4096")
        self._step("Tokenize and pack them, with a validation split")
        self._data("tokenize", *text, "--tokenizer", self.tokenizer, "--output", self.data, "--validation-fraction", "0.05")
        self._data("verify", self.data)
        self._data("stats", self.data)

    def _train_with_an_interruption(self) -> None:
        half = self.steps // 2
        self._step(f"Train, and stop halfway as a time limit would (step {half} of {self.steps})")
        self._train(f"train.stop_after={half}")
        self._step("Resume from the checkpoint and finish")
        self._train("train.resume=require")

    def _use(self) -> None:
        self._step("Evaluate, and compare with a unigram model of the same tokens")
        self._main("evaluate", self.folder, "--unigram")
        self._step("Write the report")
        self._main("report", self.folder)
        self._step("Sample")
        self._main("sample", self.folder, "--prompt", "def main(", "--max-new-tokens", "48", "--temperature", "0.7")
        self._step("Export to Hugging Face format and compare logits with transformers")
        self._main("export", self.folder, self.export, "--verify")

    def _train(self, *overrides: str) -> None:
        import torch

        gpus = torch.cuda.device_count()
        config = REPOSITORY / "configs" / "quickstart.yaml"
        settings = [f"run_dir={self.folder}", f"train.steps={self.steps}", f"data.sources.0.path={self.data}", *overrides]
        if gpus:
            settings.append("precision.compute=bf16")
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(gpus or self.processes)]
        self._command([*launcher, "-m", "mamba_pretrain", "train", str(config), *settings], threads=not gpus)

    def _data(self, *arguments: object) -> None:
        self._command([sys.executable, "-m", "data_tools", *map(str, arguments)])

    def _main(self, *arguments: object) -> None:
        self._command([sys.executable, "-m", "mamba_pretrain", *map(str, arguments)])

    def _step(self, title: str) -> None:
        self._number += 1
        print(f"\n[{self._number}/8 {time.monotonic() - self._began:4.0f} s] {title}", flush=True)

    def _command(self, command: list[str], threads: bool = False) -> None:
        import os

        print(f"$ {shlex.join(as_typed(command))}", flush=True)
        environment = dict(os.environ)
        if threads:
            # Processes that share a processor's cores must share its threads too.
            environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // self.processes)))
        code = subprocess.run(command, env=environment, check=False).returncode
        if code:
            raise typer.Exit(code)


TYPED = {"data_tools": "mamba-data", "mamba_pretrain": "mamba-pretrain", "torch.distributed.run": "torchrun"}


def as_typed(command: list[str]) -> list[str]:
    """A command of this interpreter as a user would type it: ``python -m data_tools inspect`` is ``mamba-data inspect``."""
    _, _, module, *rest = command
    return [TYPED[module], *rest]
