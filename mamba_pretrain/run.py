"""Assembles the rooms' parts into a run: the one place that knows how they fit together."""

from __future__ import annotations

import base64
import logging
from pathlib import Path
from typing import Any

import torch

from data_tools.errors import UserError
from mamba_pretrain import __version__, exit_codes
from mamba_pretrain.checkpoint.store import CheckpointStore
from mamba_pretrain.config import RunConfig
from mamba_pretrain.data.loader import TrainingData, validation_batches
from mamba_pretrain.models import flops
from mamba_pretrain.models.language_model import LanguageModel
from mamba_pretrain.monitor.signals import StopSignal
from mamba_pretrain.monitor.sinks import build_sinks
from mamba_pretrain.monitor.throughput import Throughput, peak_flops
from mamba_pretrain.monitor.watchdog import Watchdog
from mamba_pretrain.ops import registry
from mamba_pretrain.optim.build import optimizer_builder
from mamba_pretrain.optim.groups import group_table
from mamba_pretrain.optim.schedule import learning_rate
from mamba_pretrain.parallel import topology as ranks
from mamba_pretrain.parallel.engine import build_engine
from mamba_pretrain.parallel.topology import Topology
from mamba_pretrain.training.batch_schedule import BatchSchedule, total_steps
from mamba_pretrain.training.callbacks import Callback, CollectGarbage, Evaluate, ReadMetrics, Sample, Save, StopOnSignal, WriteRows
from mamba_pretrain.training.evaluation import Evaluation, evaluate
from mamba_pretrain.training.guards import ResumeGuard, SpikeGuard, describe_differences
from mamba_pretrain.training.loop import FINISHED, Run, StepRecord, train_loop
from mamba_pretrain.training.state import TrainState

log = logging.getLogger(__name__)

STOP_AFTER = "train.stop_after"


def run_training(config: RunConfig) -> int:
    """Trains as configured, on this process's rank; returns the exit code (``mamba_pretrain.exit_codes``)."""
    topology = ranks.initialize(config.parallel)
    logging.basicConfig(level=logging.INFO if topology.rank == 0 else logging.WARNING, format="%(message)s", force=True)
    training = Training(config, topology)
    try:
        reason = train_loop(training.run)
    finally:
        training.close()
        ranks.shutdown()
    return exit_codes.DONE if reason in (FINISHED, STOP_AFTER) else exit_codes.REQUEUE


class Training:
    """A run with all its parts: built, resumed where the folder holds a checkpoint, and ready for ``train_loop``."""

    def __init__(self, config: RunConfig, topology: Topology) -> None:
        self.config = config
        self.topology = topology
        self.folder = open_run_folder(config, topology)
        train = config.train
        if train.deterministic:
            torch.use_deterministic_algorithms(True)
        self.data = TrainingData(config.data, config.seed, topology.rank, topology.world_size, train.micro_batch_size)
        check_vocabulary(config, self.data)
        batches = BatchSchedule.build(train, self.data.sequence_length, topology.world_size * train.micro_batch_size)
        steps = total_steps(train, batches, self.data.sequence_length)
        self.engine, self.model = build_model(config, topology)
        self.store = CheckpointStore(self.folder / "checkpoints", config.checkpoint, topology)
        self.watchdog = Watchdog(self.folder, topology, train.hang_timeout)
        self.run = Run(
            folder=self.folder,
            engine=self.engine,
            data=self.data,
            train=train,
            batches=batches,
            total_steps=steps,
            learning_rate=lambda step: learning_rate(config.optim.schedule, config.optim.lr, steps, step),
            max_grad_norm=config.optim.max_grad_norm,
        )
        guard = self._resume()
        self.run.callbacks = self._callbacks(guard)
        self.watchdog.start()

    # -- checkpoints

    def _resume(self) -> ResumeGuard | None:
        """Continues from the folder's last checkpoint, or starts from another run's weights, or anew."""
        train = self.config.train
        checkpoint = None if train.resume == "never" else self.store.open()
        if checkpoint is None:
            if train.resume == "require":
                raise UserError(f"{self.folder} holds no complete checkpoint to resume from; start with train.resume=auto")
            if train.init_from is not None:
                self.engine.load(CheckpointStore.open_anywhere(train.init_from), weights_only=True)
            return None
        self._restore(checkpoint)
        self.run.state.restarts += 1
        log.info("resuming %s at step %d (restart %d)", self.folder, self.run.state.step, self.run.state.restarts)
        if not train.resume_guard:
            return None
        differences = describe_differences(checkpoint.meta["circumstances"], self._circumstances())
        return ResumeGuard(self.run.state.losses, differences)

    def _restore(self, checkpoint: Any) -> None:
        self.engine.load(checkpoint.reader)
        self.data.load(checkpoint.meta["data"])
        self.run.state = TrainState.from_dict(checkpoint.meta["state"])
        torch.set_rng_state(torch.tensor(list(bytes.fromhex(checkpoint.meta["rng"])), dtype=torch.uint8))

    def _save(self, run: Run) -> None:
        meta = {
            "state": run.state.to_dict(),
            "data": self.data.state(),
            "rng": bytes(torch.get_rng_state().tolist()).hex(),
            "circumstances": self._circumstances(),
            "tokens": run.state.tokens,
            "version": __version__,
        }
        self.store.save(self.engine, run.state.step, meta)

    def _rollback(self, run: Run) -> None:
        """Back to the last checkpoint, past the data that led to the spike."""
        spoiled, events, restarts = run.state.step, run.state.spike_events, run.state.restarts
        checkpoint = self.store.open()
        if checkpoint is None:
            log.warning("a spike before the first checkpoint: its update was left out, there is nothing to roll back to")
            return
        self._restore(checkpoint)
        run.state.skipped_samples += run.batches.first_sample(spoiled) - run.batches.first_sample(run.state.step)
        run.state.spike_events, run.state.restarts = events, restarts
        run.event("rollback", spoiled_step=spoiled)

    def _circumstances(self) -> dict[str, Any]:
        """What should be as it was when a checkpoint is resumed; the resume guard names differences."""
        config = self.config.model_dump(mode="json", include={"seed", "model", "data", "optim", "precision", "train"})
        return {"config": config, "data_fingerprint": self.data.fingerprint, "world_size": self.topology.world_size, "engine": self.engine.name}

    # -- callbacks

    def _callbacks(self, resume_guard: ResumeGuard | None) -> list[Callback]:
        config, train = self.config, self.config.train
        clock = ReadMetrics(self._describe, eager=train.spikes.action in ("skip", "rollback"))
        rows = WriteRows(build_sinks(config, self.folder, self.topology, self.run), config.monitor.log_every)
        guards: list[Callback] = [SpikeGuard(train.spikes, self._rollback)]
        if resume_guard is not None:
            guards.append(resume_guard)
        chain: list[Callback] = [clock, rows, *guards, Heartbeat(self.watchdog)]
        chain.append(Evaluate(config.evaluation, self._evaluate, clock))
        if config.evaluation.prompts:
            chain.append(Sample(config.evaluation, self._generate, clock))
        chain.append(StopOnSignal(self._stop_requested))
        chain.append(Save(config.checkpoint.every_steps, self._save, clock))
        if train.gc_every:
            chain.append(CollectGarbage(train.gc_every))
        return chain

    def _describe(self, record: Any, seconds: float) -> dict[str, Any]:
        return self._throughput.row(record.metrics, seconds)

    def _evaluate(self) -> dict[str, tuple[Evaluation, float | None]]:
        config = self.config
        found = {}
        for source in config.data.sources:
            batches = validation_batches(
                config.data, source.name, self.topology.rank, self.topology.world_size, config.train.micro_batch_size, config.evaluation.max_samples
            )
            found[source.name] = evaluate(self.engine, batches), None
        return found

    def _generate(self, prompts: list[str]) -> list[str] | None:
        """Every rank takes part in gathering the weights; the main rank writes."""
        weights = self.engine.full_state_dict()
        if self.topology.rank != 0:
            return None
        from mamba_pretrain.models.generation import continue_texts

        return continue_texts(self.config.model, weights, self.data.tokenizer_dir, prompts, self.config.evaluation.max_new_tokens)

    def _stop_requested(self) -> str | None:
        if self.run.state.step == self.config.train.stop_after:
            return STOP_AFTER
        return self._signal.agreed()

    def close(self) -> None:
        """Waits for the last save and stops the threads."""
        self.store.wait()
        self.data.close()
        self.watchdog.stop()
