"""Assembles the rooms' parts into a run: the one place that knows how they fit together."""

from __future__ import annotations

import base64
import logging
import shutil
from pathlib import Path
from typing import Any

import torch

from data_tools.errors import UserError
from mamba_pretrain import __version__, exit_codes
from mamba_pretrain.checkpoint.reading import Checkpoint, open_checkpoint
from mamba_pretrain.checkpoint.store import CheckpointStore, SaveError
from mamba_pretrain.config import RunConfig
from mamba_pretrain.data.loader import TrainingData, bytes_per_token, validation_batches, validation_names
from mamba_pretrain.models import model_flops
from mamba_pretrain.models.generation import continue_texts
from mamba_pretrain.models.language_model import LanguageModel
from mamba_pretrain.monitor.compute_clock import ComputeClock
from mamba_pretrain.monitor.layers import LayerStatistics
from mamba_pretrain.monitor.profiler import Profile
from mamba_pretrain.monitor.signals import StopSignal
from mamba_pretrain.monitor.sinks import build_sinks
from mamba_pretrain.monitor.throughput import Throughput, peak_flops
from mamba_pretrain.monitor.watchdog import Watchdog
from mamba_pretrain.ops import registry
from mamba_pretrain.optim.build import optimizer_builder
from mamba_pretrain.optim.groups import group_table
from mamba_pretrain.optim.schedule import learning_rate
from mamba_pretrain.parallel import topology as ranks
from mamba_pretrain.parallel.build import build_engine
from mamba_pretrain.parallel.topology import Topology
from mamba_pretrain.training.batch_schedule import BatchSchedule, total_steps
from mamba_pretrain.training.callbacks import Beat, CollectGarbage, Evaluate, ReadMetrics, Sample, Save, StopOnSignal, WriteRows
from mamba_pretrain.training.evaluation import Evaluation, evaluate
from mamba_pretrain.training.guards import ResumeGuard, SpikeGuard, describe_differences
from mamba_pretrain.training.loop import FINISHED, Callback, Run, train_loop
from mamba_pretrain.training.state import TrainState

log = logging.getLogger(__name__)

STOP_AFTER = "train.stop_after"
# Seconds that a run which failed gives a save under way: its peers may be gone, and then the save never ends.
PATIENCE_AFTER_FAILURE = 60.0


def run_training(config: RunConfig) -> int:
    """Trains as configured, on this process's rank; returns the exit code (``mamba_pretrain.exit_codes``)."""
    topology = ranks.initialize(config.parallel)
    logging.basicConfig(level=logging.INFO if topology.rank == 0 else logging.WARNING, format="%(message)s", force=True)
    failed = True
    try:
        training = Training(config, topology)
        try:
            reason = train_loop(training.run)
        except BaseException:
            training.abandon()
            raise
        training.close()
        failed = False
    finally:
        ranks.shutdown(failed)
    return exit_codes.DONE if reason in (FINISHED, STOP_AFTER) else exit_codes.REQUEUE


class Training:
    """A run with all its parts: built, resumed where the folder holds a checkpoint, and ready for ``train_loop``."""

    def __init__(self, config: RunConfig, topology: Topology) -> None:
        self.config = config
        self.topology = topology
        train, folder = config.train, config.run_dir
        check_run_folder(folder)
        torch.use_deterministic_algorithms(train.deterministic)
        self.data = TrainingData(config.data, config.seed, topology.rank, topology.world_size, train.micro_batch_size)
        check_vocabulary(config, self.data)
        batches = BatchSchedule.build(train, self.data.sequence_length, topology.world_size * train.micro_batch_size)
        steps = total_steps(train, batches, self.data.sequence_length)
        self.store = CheckpointStore(folder / "checkpoints", config.checkpoint, topology)
        model = build_model(config)
        self.engine = build_engine(config.parallel, config.precision, topology)
        self.engine.isolate_documents = config.data.isolate_documents
        self.engine.prepare(model, optimizer_builder(config.optim, model.parameter_policies()), config.seed)
        self.run = Run(
            folder=folder,
            engine=self.engine,
            data=self.data,
            train=train,
            batches=batches,
            total_steps=steps,
            learning_rate=lambda step: learning_rate(config.optim.schedule, config.optim.lr, steps, step),
            max_grad_norm=config.optim.max_grad_norm,
        )
        resume_guard = self._resume()
        if topology.rank == 0:
            write_run_folder(config, self.data.tokenizer_dir)
        self._throughput = build_throughput(config, model, topology)
        self._compute_clock = ComputeClock(topology.device)
        self._compute_clock.watch(self.engine)
        self._signal = StopSignal(topology.world_size)
        self.watchdog = Watchdog(folder, topology, train.hang_timeout).start()
        self._sinks = self._open_sinks()
        self.run.callbacks = self._callbacks(resume_guard)
        if self.run.state.restarts:
            self.run.event("resume", restart=self.run.state.restarts, engine=self.engine.name, world_size=topology.world_size)

    # -- checkpoints

    def _resume(self) -> ResumeGuard | None:
        """Continues from the folder's last checkpoint, or starts from another run's weights, or anew."""
        train = self.config.train
        checkpoint = None if train.resume == "never" else self.store.open()
        if checkpoint is None:
            if train.resume == "require":
                raise UserError(f"{self.config.run_dir} holds no complete checkpoint to resume from; start with train.resume=auto")
            if train.init_from is not None:
                self.engine.load(open_checkpoint(Path(train.init_from)).reader, weights_only=True)
                log.info("weights from %s", train.init_from)
            return None
        self._restore(checkpoint)
        self.run.state.restarts += 1
        log.info("resuming %s at step %d (restart %d)", self.config.run_dir, self.run.state.step, self.run.state.restarts)
        if not train.resume_guard:
            return None
        return ResumeGuard(self.run.state.losses, describe_differences(checkpoint.meta["circumstances"], self._circumstances()))

    def _restore(self, checkpoint: Checkpoint) -> None:
        self.engine.load(checkpoint.reader)
        self.run.state = state = TrainState.from_dict(checkpoint.meta["state"])
        if self.data.load(checkpoint.meta["data"], self.run.batches.first_sample(state.step) + state.skipped_samples):
            log.info("the blend changes at step %d; every source goes on where it stood", state.step)
        torch.set_rng_state(torch.frombuffer(bytearray(base64.b64decode(checkpoint.meta["rng"])), dtype=torch.uint8))

    def _save(self, run: Run) -> None:
        meta = {
            "tokens": run.state.tokens,
            "state": run.state.to_dict(),
            "data": self.data.state(),
            "rng": base64.b64encode(bytes(torch.get_rng_state().tolist())).decode(),
            "circumstances": self._circumstances(),
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
        return {
            "config": config,
            "data_fingerprint": self.data.fingerprint,
            "world_size": self.topology.world_size,
            "engine": self.engine.name,
        }

    # -- callbacks

    def _callbacks(self, resume_guard: ResumeGuard | None) -> list[Callback]:
        config, train = self.config, self.config.train
        # On a CPU a step is over when it returns: read late, its time would be the next step's.
        eager = train.spikes.action in ("skip", "rollback") or self.topology.device.type == "cpu"
        clock = ReadMetrics(self._throughput.row, eager)
        chain: list[Callback] = [clock, WriteRows(self._sinks, config.monitor.log_every), SpikeGuard(train.spikes, self._rollback)]
        if resume_guard is not None:
            chain.append(resume_guard)
        if config.monitor.layers_every is not None:
            chain.append(LayerStatistics(self.engine.model, config.monitor.layers_every))  # type: ignore[attr-defined,arg-type]
        chain += [Beat(self.watchdog.beat, self._compute_clock.take), Evaluate(config.evaluation, self._evaluate, clock)]
        if config.evaluation.prompts:
            chain.append(Sample(config.evaluation, self._generate, clock))
        if train.profile_steps is not None:
            chain.append(Profile(config.run_dir, train.profile_steps, self.topology))  # type: ignore[arg-type]
        chain += [StopOnSignal(self._stop_requested), Save(config.checkpoint.every_steps, self._save, clock)]
        return [*chain, CollectGarbage(train.gc_every)] if train.gc_every else chain

    def _open_sinks(self) -> list[Any]:
        if self.topology.rank != 0:
            return []
        config, run = self.config, self.run
        described = config.model_dump(mode="json")
        return build_sinks(config.monitor, run.folder, config.name, described, run.total_steps, run.state.step or None)

    def _evaluate(self) -> dict[str, tuple[Evaluation, float | None]]:
        config, topology = self.config, self.topology
        found = {}
        for name in validation_names(config.data):
            batches = validation_batches(
                config.data, name, topology.rank, topology.world_size, config.train.micro_batch_size, config.evaluation.max_samples
            )
            found[name] = evaluate(self.engine, batches), bytes_per_token(config.data, name)
        return found

    def _generate(self, prompts: list[str]) -> list[str] | None:
        """Every rank takes part in gathering the weights; the main rank writes."""
        weights = self.engine.full_state_dict()
        if self.topology.rank != 0:
            return None
        return continue_texts(
            self.config.model, weights, self.data.tokenizer_dir, prompts, self.config.evaluation.max_new_tokens, device=self.topology.device
        )

    def _stop_requested(self) -> str | None:
        if self.run.state.step == self.config.train.stop_after:
            return STOP_AFTER
        return self._signal.agreed()

    def close(self) -> None:
        """Waits for the last save and stops the threads."""
        self.store.wait()
        self._stop()

    def abandon(self) -> None:
        """After a failure, which is what is to be told: a save that may still end is given a while, and what goes wrong with it is a line."""
        try:
            self.store.wait(PATIENCE_AFTER_FAILURE)
        except SaveError as error:
            log.warning("%s", error)
        self._stop()

    def _stop(self) -> None:
        for sink in self._sinks:
            sink.close()
        self.data.close()
        self.watchdog.stop()
        self._signal.close()  # last: a second SIGTERM must not kill the process while it saves


def check_run_folder(folder: Path) -> None:
    """Refuses to write among files that no run wrote."""
    if (
        folder.exists()
        and any(folder.iterdir())
        and not any((folder / name).exists() for name in ("config.yaml", "data", "launch", "logs"))
    ):
        raise UserError(f"run_dir {folder} holds files that are not a run's; choose another run_dir or empty it")


def write_run_folder(config: RunConfig, tokenizer_dir: Path) -> None:
    """The resolved config and the tokenizer's files, so that the folder can be used without anything else."""
    config.run_dir.mkdir(parents=True, exist_ok=True)
    (config.run_dir / "config.yaml").write_text(config.to_yaml())
    if tokenizer_dir.is_dir():
        shutil.copytree(tokenizer_dir, config.run_dir / "tokenizer", dirs_exist_ok=True)


def check_vocabulary(config: RunConfig, data: TrainingData) -> None:
    """Token ids must fit the model's embedding."""
    if data.vocab_size > config.model.vocab_size:
        raise UserError(
            f"model.vocab_size {config.model.vocab_size} is smaller than the vocabulary of the data's tokenizer, {data.vocab_size}; "
            f"set model.vocab_size={data.vocab_size}"
        )


def build_model(config: RunConfig) -> LanguageModel:
    """The model on the meta device, with the table of its parameter groups in the log."""
    registry.configure(config.ops)
    with torch.device("meta"):
        model = LanguageModel(config.model)
    sizes = [(name, parameter.numel()) for name, parameter in model.named_parameters()]
    log.info("%s: %s parameters", config.name, f"{model.n_parameters():,}")
    log.info(group_table(sizes, model.parameter_policies()))
    return model


def build_throughput(config: RunConfig, model: LanguageModel, topology: Topology) -> Throughput:
    """The meter of tokens per second and model FLOPs utilisation."""
    device = topology.device
    peak = config.monitor.peak_tflops * 1e12 if config.monitor.peak_tflops else None
    if peak is None and device.type == "cuda":
        peak = peak_flops(torch.cuda.get_device_name(device))
    per_token = model_flops.training_flops_per_token(model, config.data.sequence_length)
    return Throughput(per_token, model.n_parameters(), topology.world_size, device.type, peak, config.monitor.log_every)
