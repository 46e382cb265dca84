"""The plan of a run: everything one wants to know before it queues, from its config alone, on the meta device."""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from data_tools.errors import UserError
from mamba_pretrain.models import model_flops
from mamba_pretrain.models.config import ModelConfig
from mamba_pretrain.models.language_model import LanguageModel
from mamba_pretrain.monitor import run_folder
from mamba_pretrain.monitor.throughput import DEVICES, device_entry
from mamba_pretrain.parallel.config import graphs_unsupported
from mamba_pretrain.planning import advice, communication, memory, speed
from mamba_pretrain.planning.activations import Options

if TYPE_CHECKING:
    from mamba_pretrain.config import RunConfig

MICRO_BATCHES = (1, 2, 4, 8, 16, 32, 64)
RECOMPUTE = tuple(speed.RECOMPUTE_COST)  # the cheapest first
CHECKPOINT_BYTES = 12  # fp32 weights and two moments


@dataclass(frozen=True)
class Machine:
    """The GPUs to plan for."""

    device: str
    gpus: int
    memory_bytes: float | None
    network: communication.Network

    @classmethod
    def of(cls, device: str, gpus: int, network: communication.Network | None = None) -> Machine:
        """By a device's name; ``cpu`` has no memory limit and no time estimate. Raises UserError for an unknown GPU."""
        if device.lower() == "cpu":
            return cls("cpu", gpus, None, network or communication.Network())
        entry = device_entry(device)
        if entry is None:
            raise UserError(f"device {device!r} is not in the table; known: cpu, {', '.join(name for name, _, _ in DEVICES)}")
        return cls(entry[0], gpus, entry[2] * 1e9, network or communication.Network())


@dataclass(frozen=True)
class Candidate:
    """One way to run: does it fit, and how long would a step take."""

    strategy: str
    micro_batch: int
    recompute: str
    peak: float
    needed: float
    fits: bool
    step_seconds: float | None


@dataclass(frozen=True)
class Plan:
    """What ``mamba-pretrain plan`` shows; sizes in bytes, times in seconds."""

    name: str
    device: str
    gpus: int
    strategy: str
    recompute: str
    micro_batch: int
    accumulation: int
    sequence_length: int
    parameters: int
    parameters_by_kind: dict[str, int]
    flops_per_token: dict[str, float]
    batch_tokens: int
    steps: int
    tokens: int
    memory: dict[str, Any]
    time: dict[str, Any] | None
    checkpoint: dict[str, float]
    communication: list[dict[str, Any]]
    scaling: list[dict[str, Any]]
    network: str
    candidates: list[Candidate] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


class Planner:
    """Holds what every candidate shares: the model on the meta device, its FLOPs, the batch."""

    def __init__(self, config: RunConfig, machine: Machine) -> None:
        self.config, self.machine = config, machine
        with torch.device("meta"):
            self.model = LanguageModel(config.model)
        self.shape = memory.Shape.of(self.model)
        self.length = config.data.sequence_length
        train = config.train
        self.batch_samples = train.global_batch_size or max(1, round((train.global_batch_tokens or 0) / self.length))
        batch_tokens = self.batch_samples * self.length
        self.steps = train.steps or -(-(train.tokens or 0) // batch_tokens)
        self.training_flops = model_flops.training_flops_per_token(self.model, self.length)
        self.compute = torch.bfloat16 if config.precision.compute == "bf16" else None
        self.speed = speed.expected_speed(config.model, self.training_flops, _flops_of_measured, machine.device)

    def memory_of(self, strategy: str, micro_batch: int, recompute: str) -> memory.Memory:
        """Memory of one GPU."""
        split = self.split(strategy)
        options = Options(self.compute, recompute, fused=self.machine.device != "cpu", fp8=self.config.precision.fp8)
        moments = 2.0 if self.config.optim.name == "adamw8bit" else memory.ADAM_MOMENTS
        accumulation = self.accumulation(micro_batch)
        return memory.estimate(
            self.config.model, self.shape, split, micro_batch, self.length, accumulation, options, moments, self.replays(strategy)
        )

    def replays(self, strategy: str) -> bool:
        """Whether micro-batches are replayed from CUDA graphs."""
        parallel = self.config.parallel
        device = "cpu" if self.machine.device == "cpu" else "cuda"
        return parallel.cuda_graphs != "off" and graphs_unsupported(parallel, strategy, device) is None

    def split(self, strategy: str) -> memory.Sharding:
        """The sharding of a strategy on these GPUs."""
        return memory.sharding(strategy, self.machine.gpus, self.config.parallel.hsdp_shard_size or self.machine.network.gpus_per_node)

    def accumulation(self, micro_batch: int) -> int:
        """Micro-batches of a step on the fullest rank."""
        return -(-self.batch_samples // (self.machine.gpus * micro_batch))

    def compute_seconds(self, recompute: str) -> float | None:
        """A step's computing on one GPU."""
        if self.speed is None:
            return None
        rate = self.speed.tokens_per_second * speed.fp8_gain(self.config.precision.fp8, self.config.model.d_model)
        return self.batch_samples * self.length / rate * speed.RECOMPUTE_COST[recompute]

    def launching_seconds(self, strategy: str, micro_batches: int) -> float:
        """What so many micro-batches take at least on a GPU that waits for Python."""
        if self.machine.device == "cpu":
            return 0.0
        return speed.launching_seconds(strategy, self.config.model.n_layer, micro_batches)

    def traffic(self, strategy: str, micro_batch: int) -> list[communication.Traffic]:
        """What a step sends."""
        split = self.split(strategy)
        return communication.traffic(
            split,
            self.shape.total,
            self.config.model.n_layer,
            self.accumulation(micro_batch),
            2 if self.compute else 4,
            self.machine.network.gpus_per_node,
        )

    def candidate(self, strategy: str, micro_batch: int, recompute: str) -> Candidate:
        """Judges one way to run."""
        found = self.memory_of(strategy, micro_batch, recompute)
        fits = self.machine.memory_bytes is None or found.needed <= self.machine.memory_bytes
        compute = self.compute_seconds(recompute)
        seconds = None
        if compute is not None:
            per_rank = -(-self.batch_samples // self.machine.gpus) / self.batch_samples
            seconds = communication.step_seconds(compute * per_rank, self.traffic(strategy, micro_batch), self.machine.network)
            seconds = max(seconds, self.launching_seconds(strategy, self.accumulation(micro_batch)))
        return Candidate(strategy, micro_batch, recompute, found.peak, found.needed, fits, seconds)

    def candidates(self) -> list[Candidate]:
        """Every strategy, micro-batch and checkpointing mode that the global batch allows."""
        gpus = self.machine.gpus
        strategies = [s for s in memory.STRATEGIES if (s == "single") == (gpus == 1)]
        if gpus <= self.machine.network.gpus_per_node and "hsdp" in strategies:
            strategies.remove("hsdp")  # inside one node it is FSDP2
        sizes = [m for m in MICRO_BATCHES if self.batch_samples % (m * gpus) == 0] or [1]
        return [self.candidate(s, m, r) for s in strategies for m in sizes for r in RECOMPUTE]

    def best(self) -> list[Candidate]:
        """Candidates that fit: the fastest first; among equals the larger micro-batch, then the smaller memory."""
        fitting = [c for c in self.candidates() if c.fits]
        return sorted(fitting, key=lambda c: (RECOMPUTE.index(c.recompute), round(c.step_seconds or 0.0, 3), -c.micro_batch, c.needed))


def make_plan(config: RunConfig, machine: Machine, alternatives: bool = True) -> Plan:
    """The plan of ``config`` on ``machine``; ``alternatives`` adds the table of engines and micro-batches."""
    planner = Planner(config, machine)
    strategy = strategy_on(config.parallel.strategy, machine.gpus)
    micro_batch, recompute = config.train.micro_batch_size, config.parallel.activation_checkpointing
    used = planner.memory_of(strategy, micro_batch, recompute)
    chosen = planner.candidate(strategy, micro_batch, recompute)
    flows = planner.traffic(strategy, micro_batch)
    return Plan(
        name=config.name,
        device=machine.device,
        gpus=machine.gpus,
        strategy=strategy,
        recompute=recompute,
        micro_batch=micro_batch,
        accumulation=planner.accumulation(micro_batch),
        sequence_length=planner.length,
        parameters=planner.shape.total,
        parameters_by_kind=memory.parameters_by_kind(planner.model),
        flops_per_token={
            "forward": planner.model.flops_per_token(planner.length),
            "training": planner.training_flops,
            "six_n": model_flops.six_n_per_token(planner.model),
        },
        batch_tokens=planner.batch_samples * planner.length,
        steps=planner.steps,
        tokens=planner.steps * planner.batch_samples * planner.length,
        memory=_memory_dict(used, machine),
        time=_time(planner, chosen),
        checkpoint=_checkpoint(config, planner.shape.total),
        communication=[asdict(flow) for flow in flows],
        scaling=_scaling(planner, strategy, micro_batch, recompute),
        network=machine.network.statement,
        candidates=planner.candidates() if alternatives else [],
        warnings=_warnings(planner, chosen),
    )


def strategy_on(strategy: str, gpus: int) -> str:
    """The engine that a configured strategy means on so many GPUs."""
    if gpus == 1:
        return "single"
    return "fsdp2" if strategy in ("auto", "single") else strategy


@functools.cache
def _flops_of_measured(mixer: str, n_layer: int, d_model: int) -> float:
    """Training FLOPs per token of a published size at length 2048, which the measured figures belong to."""
    vocabulary = 50277
    config = ModelConfig(mixer=mixer, n_layer=n_layer, d_model=d_model, vocab_size=vocabulary)  # type: ignore[arg-type]
    return model_flops.describe(config, 2048)["training"]


def _memory_dict(used: memory.Memory, machine: Machine) -> dict[str, Any]:
    fits = machine.memory_bytes is None or used.needed <= machine.memory_bytes
    return {
        "parts": used.parts,
        "peak": used.peak,
        "needed": used.needed,
        "capacity": machine.memory_bytes,
        "fits": fits,
        "moment": used.moment,
        "activations_by_mixer": used.by_mixer,
    }


def _time(planner: Planner, chosen: Candidate) -> dict[str, Any] | None:
    if planner.speed is None or chosen.step_seconds is None:
        return None
    total = chosen.step_seconds * planner.steps
    rate = planner.batch_samples * planner.length / chosen.step_seconds
    gpus = planner.machine.gpus
    entry = device_entry(planner.machine.device)
    peak = entry[1] * 1e12 * gpus if entry else float("nan")
    return {
        "step_seconds": chosen.step_seconds,
        "tokens_per_second": rate,
        "mfu": rate * planner.training_flops / peak,
        "seconds": total,
        "gpu_hours": total * gpus / 3600,
        "source": planner.speed.source,
    }


def _checkpoint(config: RunConfig, n_parameters: int) -> dict[str, float]:
    one = float(CHECKPOINT_BYTES * n_parameters)
    kept = getattr(config.checkpoint, "keep_last", None) or 1
    return {"bytes": one, "kept": float(kept), "on_disk": one * (kept + 1), "export": 4.0 * n_parameters}


def _scaling(planner: Planner, strategy: str, micro_batch: int, recompute: str) -> list[dict[str, Any]]:
    compute = planner.compute_seconds(recompute)
    if compute is None:
        return []
    model, network = planner.config.model, planner.machine.network
    multi = "ddp" if strategy == "single" else strategy
    width = 2 if planner.compute else 4
    least = planner.launching_seconds(multi, 1)
    points = communication.scaling(
        multi, planner.shape.total, model.n_layer, compute, planner.batch_samples, micro_batch, width, network, least
    )
    return [asdict(point) for point in points]


def _warnings(planner: Planner, chosen: Candidate) -> list[str]:
    config, machine = planner.config, planner.machine
    model, micro_batch = config.model, config.train.micro_batch_size
    batch_tokens = planner.batch_samples * planner.length
    tokens = planner.steps * batch_tokens
    found = []
    if machine.memory_bytes is not None and not chosen.fits:
        found.append(
            f"needs {chosen.needed / 1e9:.1f} GB but {machine.device} has {machine.memory_bytes / 1e9:.1f}: out of memory; try plan --find"
        )
    found += advice.batch_warnings(planner.batch_samples, micro_batch, machine.gpus)
    launching = planner.launching_seconds(chosen.strategy, planner.accumulation(micro_batch))
    found += advice.engine_warnings(chosen.strategy, chosen.step_seconds, launching)
    found += advice.overflow_warnings(model, micro_batch, planner.length)
    found += advice.shape_warnings(model, planner.length)
    if config.train.init_from is None:  # a run that goes on from trained weights has a rate and a length of its own
        found += advice.recipe_warnings(model, planner.shape.total, batch_tokens, tokens, config.optim.lr)
    if config.train.batch_ramp is not None:
        found.append("the batch ramp is left out of the estimates: the first steps are smaller and the run has a few more of them")
    return found + advice.data_warnings(tokens, available_tokens([str(source.path) for source in config.data.sources]))


def available_tokens(paths: list[str]) -> int | None:
    """Training tokens of the datasets; None unless all are at hand."""
    counts = [run_folder.training_tokens(Path(path)) for path in paths]
    return None if None in counts else sum(count or 0 for count in counts)
