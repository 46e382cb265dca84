"""The one training loop, whatever the model, engine or launcher, and the hooks around its steps."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mamba_pretrain.training.batch_schedule import BatchSchedule
from mamba_pretrain.training.config import TrainConfig
from mamba_pretrain.training.state import TrainState
from mamba_pretrain.training.step import StepMetrics, train_step

if TYPE_CHECKING:
    from mamba_pretrain.data.loader import TrainingData
    from mamba_pretrain.parallel.engine import Engine

FINISHED = "finished"

Row = dict[str, Any]  # of metrics


@dataclass
class Run:
    """The parts of a run, assembled by ``mamba_pretrain.run``; callbacks receive it."""

    folder: Path
    engine: Engine
    data: TrainingData
    train: TrainConfig
    batches: BatchSchedule
    total_steps: int
    learning_rate: Callable[[int], float]  # of a 0-based step
    max_grad_norm: float
    state: TrainState = field(default_factory=TrainState)
    callbacks: list[Callback] = field(default_factory=list)
    skip_if: Callable[[torch.Tensor], bool] | None = None
    stop_reason: str | None = None

    @property
    def is_main(self) -> bool:
        """Whether this process writes what is written once."""
        return self.engine.topology.rank == 0

    def tell(self, hook: str, *arguments: Any) -> None:
        """Calls a hook of every callback, in order."""
        for callback in self.callbacks:
            getattr(callback, hook)(self, *arguments)

    def event(self, name: str, **details: Any) -> None:
        """Puts an event row into the metrics."""
        self.tell("on_row", {"kind": "event", "step": self.state.step, "time": time.time(), "event": name, **details})


@dataclass(frozen=True)
class StepRecord:
    """What is known of a step right after it was queued; the tensors in ``metrics`` may still be in flight on the device."""

    step: int
    tokens: int  # of the run so far
    step_tokens: int
    lr: float
    metrics: StepMetrics
    data_wait: float
    queued_at: float  # on the clock of time.perf_counter


class Callback:
    """The hooks, all optional. Every rank runs every callback in the same order, so hooks may communicate."""

    def on_start(self, run: Run) -> None:
        """Before the first step."""

    def on_step(self, run: Run, record: StepRecord) -> None:
        """After a step has been queued on the device; reading the record's tensors waits for it."""

    def on_row(self, run: Run, row: Row) -> None:
        """A row of metrics is known on the host: a train row (one step late), an evaluation, an event, a sample of text."""

    def on_save(self, run: Run) -> None:
        """Before a checkpoint of the current state is taken."""

    def on_stop(self, run: Run, reason: str) -> None:
        """After the last step."""

    def on_exit(self, run: Run) -> None:
        """However training ended, by a failure too, so other ranks may be gone: for what must be put back in this process."""


def train_loop(run: Run) -> str:
    """Trains until ``run.total_steps`` or until a callback sets ``run.stop_reason``; returns the reason."""
    try:
        return _train(run)
    finally:
        run.tell("on_exit")


def _train(run: Run) -> str:
    run.tell("on_start")
    while run.state.step < run.total_steps and run.stop_reason is None:
        step = run.state.step
        size = run.batches.size(step)
        asked = time.perf_counter()
        batches = run.data.take(run.batches.first_sample(step) + run.state.skipped_samples, size)
        data_wait = time.perf_counter() - asked
        lr = run.learning_rate(step)
        metrics = train_step(run.engine, batches, lr, run.max_grad_norm, run.skip_if)
        tokens = size * run.data.sequence_length
        run.state.step += 1
        run.state.tokens += tokens
        run.tell("on_step", StepRecord(run.state.step, run.state.tokens, tokens, lr, metrics, data_wait, time.perf_counter()))
    reason = run.stop_reason or FINISHED
    run.tell("on_stop", reason)
    return reason
