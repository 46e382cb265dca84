"""What happens around the steps: each callback has one job."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

from mamba_pretrain.training.config import EvaluationConfig
from mamba_pretrain.training.evaluation import Evaluation
from mamba_pretrain.training.loop import Callback, Row, Run, StepRecord


class ReadMetrics(Callback):
    """Turns step records into train rows, one step late: the host queues a step while the device still computes the one before."""

    def __init__(self, throughput: Callable[[int, float], Row], eager: bool = False) -> None:
        """``throughput(tokens, seconds)`` gives further columns; ``eager`` reads each step at once (the spike guard needs it)."""
        self._throughput = throughput
        self._eager = eager
        self._pending: StepRecord | None = None
        self._last_finish = self._last_queued = 0.0

    def on_start(self, run: Run) -> None:
        """Starts the clock of the first step."""
        self._last_finish = self._last_queued = time.perf_counter()

    def on_step(self, run: Run, record: StepRecord) -> None:
        """Reads the previous step and keeps this one."""
        self._read(run)
        self._pending = record
        if self._eager:
            self._read(run)

    def on_save(self, run: Run) -> None:
        """A checkpoint's history includes its own step."""
        self._read(run)

    def on_stop(self, run: Run, reason: str) -> None:
        """Reads the last step."""
        self._read(run)

    def _read(self, run: Run) -> None:
        record, self._pending = self._pending, None
        if record is None:
            return
        loss, grad_norm = record.metrics.read()
        now = time.perf_counter()
        # Read late, a step took the time between two reads. Read at once (before a save), the last read is but a moment ago, and the time
        # between two launches tells.
        seconds = max(now - self._last_finish, record.queued_at - self._last_queued)
        self._last_finish, self._last_queued = now, record.queued_at
        run.state.remember(loss, grad_norm)
        row: Row = {"kind": "train", "step": record.step, "tokens": record.tokens, "time": time.time(), "loss": loss, "lr": record.lr}
        row |= {"grad_norm": grad_norm, "step_time": seconds, "data_wait": record.data_wait, "restart": run.state.restarts}
        if record.metrics.skipped:
            row["skipped"] = True
        run.tell("on_row", row | self._throughput(record.step_tokens, seconds))

    def exclude(self, seconds: float) -> None:
        """Takes time spent on evaluation or saving out of the next step's time."""
        self._last_finish += seconds
        self._last_queued += seconds


class WriteRows(Callback):
    """Hands rows to the sinks (jsonl, console, W&B) on the main rank; train rows at every ``log_every`` steps."""

    def __init__(self, sinks: list[Any], log_every: int) -> None:
        self._sinks = sinks
        self._log_every = log_every

    def on_row(self, run: Run, row: Row) -> None:
        """Writes the row if it is due."""
        if row["kind"] == "train" and row["step"] % self._log_every and row["step"] != run.total_steps:
            return
        for sink in self._sinks:
            sink.write(row)

    def on_stop(self, run: Run, reason: str) -> None:
        """Records why the run stopped; the sinks stay open for the final save's row."""
        run.event("stop", reason=reason)


class Evaluate(Callback):
    """Validation every ``every_steps`` steps and at the end."""

    def __init__(
        self, config: EvaluationConfig, measure: Callable[[], dict[str, tuple[Evaluation, float | None]]], clock: ReadMetrics
    ) -> None:
        """``measure()`` gives, per dataset, the evaluation and the dataset's bytes per token if known."""
        self._config = config
        self._measure = measure
        self._clock = clock

    def on_step(self, run: Run, record: StepRecord) -> None:
        """Evaluates when the step is due."""
        due = self._config.every_steps is not None and record.step % self._config.every_steps == 0
        if due or (self._config.at_end and record.step == run.total_steps):
            self._clock.on_save(run)
            began = time.perf_counter()
            for name, (result, bytes_per_token) in self._measure().items():
                row: Row = {"kind": "eval", "step": record.step, "tokens": record.tokens, "time": time.time(), "name": name}
                row |= {"loss": result.loss, "perplexity": result.perplexity, "n_tokens": result.n_tokens}
                row["bits_per_byte"] = result.bits_per_byte(bytes_per_token)
                run.tell("on_row", row)
            self._clock.exclude(time.perf_counter() - began)


class Sample(Callback):
    """Continues the configured prompts after each evaluation, so that the report shows what the model writes."""

    def __init__(self, config: EvaluationConfig, generate: Callable[[list[str]], list[str] | None], clock: ReadMetrics) -> None:
        """``generate(prompts)`` runs on every rank and returns the continuations on the main rank."""
        self._config = config
        self._generate = generate
        self._clock = clock
        self._due = False

    def on_row(self, run: Run, row: Row) -> None:
        """Remembers that an evaluation took place at this step."""
        self._due = self._due or row["kind"] == "eval"

    def on_step(self, run: Run, record: StepRecord) -> None:
        """Generates after an evaluation; this callback stands behind Evaluate."""
        if not self._due:
            return
        self._due = False
        began = time.perf_counter()
        texts = self._generate(self._config.prompts)
        for prompt, text in zip(self._config.prompts, texts or [], strict=False):
            run.tell("on_row", {"kind": "sample", "step": record.step, "time": time.time(), "prompt": prompt, "text": text})
        self._clock.exclude(time.perf_counter() - began)


class Save(Callback):
    """Saves a checkpoint every ``every_steps`` steps and when the run stops, unless it stops on an error."""

    def __init__(self, every_steps: int | None, save: Callable[[Run], None], clock: ReadMetrics) -> None:
        self._every = every_steps
        self._save_checkpoint = save
        self._clock = clock
        self._saved_at = -1

    def on_start(self, run: Run) -> None:
        """The checkpoint just loaded need not be written again."""
        self._saved_at = run.state.step

    def on_step(self, run: Run, record: StepRecord) -> None:
        """Saves when the step is due."""
        if self._every is not None and record.step % self._every == 0:
            self._save(run)

    def on_stop(self, run: Run, reason: str) -> None:
        """Saves the final state."""
        if run.state.step != self._saved_at:
            self._save(run)

    def _save(self, run: Run) -> None:
        run.tell("on_save")
        began = time.perf_counter()
        self._save_checkpoint(run)
        seconds = time.perf_counter() - began
        self._saved_at = run.state.step
        run.event("save", seconds=round(seconds, 3))
        self._clock.exclude(seconds)


class Beat(Callback):
    """Tells the watchdog that the rank moves, and how long it computed by itself."""

    def __init__(self, beat: Callable[..., None], compute_seconds: Callable[[], float]) -> None:
        self._beat = beat
        self._compute_seconds = compute_seconds

    def on_step(self, run: Run, record: StepRecord) -> None:
        """A step is queued; what follows until the next may be an evaluation."""
        self._beat(record.step, "train", self._compute_seconds())

    def on_save(self, run: Run) -> None:
        """A checkpoint is about to be taken."""
        self._beat(run.state.step, "save")


class StopOnSignal(Callback):
    """Stops at a step boundary when any rank was told to (time limit, preemption), agreed on by all ranks."""

    def __init__(self, requested: Callable[[], str | None]) -> None:
        """``requested()`` communicates and returns the same reason on every rank."""
        self._requested = requested

    def on_step(self, run: Run, record: StepRecord) -> None:
        """Asks once a step."""
        run.stop_reason = run.stop_reason or self._requested()


class CollectGarbage(Callback):
    """Collects Python's garbage on all ranks at the same steps: a collection at random times makes one rank stall the others.

    Also behind the first step: kernels are compiled and tuned there, and what that leaves behind in cycles may hold a GPU's memory.
    """

    def __init__(self, every_steps: int) -> None:
        self._every = every_steps
        self._first = True

    def on_start(self, run: Run) -> None:
        """Turns automatic collection off."""
        gc.collect()
        gc.disable()

    def on_step(self, run: Run, record: StepRecord) -> None:
        """Collects when due."""
        if self._first or record.step % self._every == 0:
            gc.collect(1)
        self._first = False

    def on_exit(self, run: Run) -> None:
        """Turns automatic collection on again."""
        gc.enable()
