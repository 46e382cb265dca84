"""Guards against silent failure: loss spikes during training, and a resume that does not continue where it stopped."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Any

import torch

from mamba_pretrain.training.config import SpikeConfig
from mamba_pretrain.training.loop import Callback, Row, Run, StepRecord


class TrainingError(RuntimeError):
    """The run cannot go on; the message says what was seen, where, and what to look at."""


def is_spike(value: float, history: list[float], config: SpikeConfig) -> bool:
    """Whether ``value`` is not finite, or above the recent mean by more than ``sigma`` standard deviations.

    Needs a full quarter of the window first: early losses fall too fast to define a deviation.
    """
    if not math.isfinite(value):
        return True
    recent = [x for x in history[-config.window :] if math.isfinite(x)]
    if len(recent) < config.window // 4:
        return False
    mean, deviation = statistics.fmean(recent), statistics.pstdev(recent)
    return value > mean + config.sigma * max(deviation, 1e-3 * abs(mean))


class SpikeGuard(Callback):
    """Watches loss and gradient norm; stops, skips the update, or rolls back, as configured, and at most ``max_events`` times."""

    def __init__(self, config: SpikeConfig, rollback: Callable[[Run], None]) -> None:
        """``rollback(run)`` restores the last checkpoint and passes over the data consumed since."""
        self._config = config
        self._rollback = rollback

    def on_start(self, run: Run) -> None:
        """Asks the engine to consult the guard before each update."""
        if self._config.action in ("skip", "rollback"):
            run.skip_if = lambda norm: is_spike(float(norm), run.state.grad_norms, self._config)

    def on_row(self, run: Run, row: Row) -> None:
        """Judges a train row; in skip and rollback mode a bad norm was already kept from the weights."""
        if row["kind"] != "train":
            return
        losses, norms = run.state.losses[:-1], run.state.grad_norms[:-1]
        if not (row.get("skipped") or is_spike(row["loss"], losses, self._config) or is_spike(row["grad_norm"], norms, self._config)):
            return
        run.state.spike_events += 1
        if row.get("skipped"):
            # What was left out must not widen the band that later steps are judged by.
            run.state.losses.pop()
            run.state.grad_norms.pop()
        run.event("spike", action=self._config.action, at=row["step"], loss=row["loss"], grad_norm=row["grad_norm"])
        finite = math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])
        where = f"step {row['step']}: loss {row['loss']:.6g}, gradient norm {row['grad_norm']:.6g}"
        if self._config.action == "stop" and not finite:
            raise TrainingError(f"{where} is not finite; lower optim.lr, or set train.spikes.action to skip or rollback")
        if self._config.action in ("skip", "rollback") and run.state.spike_events > self._config.max_events:
            raise TrainingError(f"{where}: more than train.spikes.max_events = {self._config.max_events} spikes; the run does not converge")

    def on_step(self, run: Run, record: StepRecord) -> None:
        """Rolls back after a skipped update; rows of the step are read by then (the metrics are eager in this mode)."""
        if self._config.action == "rollback" and record.metrics.skipped:
            self._rollback(run)


class ResumeGuard(Callback):
    """Compares the first losses after a resume with the last ones before it; a jump is an error that names what changed."""

    STEPS = 5

    def __init__(self, before: list[float], differences: list[str]) -> None:
        """``before``: losses saved in the checkpoint; ``differences``: sentences on what is not as it was when it was saved."""
        self._before = [x for x in before if math.isfinite(x)]
        self._differences = differences
        self._after: list[float] = []

    def on_row(self, run: Run, row: Row) -> None:
        """Judges the first few train rows."""
        if row["kind"] != "train" or len(self._after) >= self.STEPS or len(self._before) < 4:
            return
        self._after.append(row["loss"])
        recent = self._before[-16:]
        mean, deviation = statistics.fmean(recent), statistics.pstdev(recent)
        # While the loss still falls steeply the deviation is large by itself; 10% of the mean is far outside any batch-to-batch noise.
        allowed = mean + max(6.0 * deviation, 0.1 * mean)
        if row["loss"] > allowed:
            causes = (
                "; ".join(self._differences) or "config, data, precision and world size are as they were, so suspect the checkpoint itself"
            )
            raise TrainingError(
                f"loss {row['loss']:.4f} at step {row['step']} after the resume, but {mean:.4f} on average before it: {causes}. "
                "Set train.resume_guard=false to go on all the same"
            )


def describe_differences(saved: dict[str, Any], current: dict[str, Any], prefix: str = "") -> list[str]:
    """Sentences for every key whose value differs between two nested dicts."""
    found: list[str] = []
    for key in sorted({*saved, *current}):
        old, new = saved.get(key), current.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += describe_differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key} was {old!r} and is {new!r}")
    return found


def finite_or_none(value: torch.Tensor | float) -> float | None:
    """A float for JSON: None when it is not finite."""
    number = float(value)
    return number if math.isfinite(number) else None
