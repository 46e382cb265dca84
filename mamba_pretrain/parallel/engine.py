"""The engine contract: everything that differs between one process, DDP, FSDP2, HSDP and DeepSpeed is behind these methods."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mamba_pretrain.models.boundaries import Boundaries
from mamba_pretrain.models.fp8 import use_fp8
from mamba_pretrain.models.language_model import LanguageModel
from mamba_pretrain.optim.build import Build
from mamba_pretrain.parallel.config import ParallelConfig, PrecisionConfig
from mamba_pretrain.parallel.topology import Topology, strategy_of

if TYPE_CHECKING:
    from mamba_pretrain.data.batch import Batch
    from mamba_pretrain.parallel.portable import Reader, Segment

log = logging.getLogger(__name__)

SkipIf = Callable[[Tensor], bool]


@dataclass(frozen=True)
class StepResult:
    """``grad_norm``: global norm before clipping, 0-d on the device. ``skipped``: the update was left out."""

    grad_norm: Tensor
    skipped: bool


class Engine(ABC):
    """Holds model and optimizer. Gradients are sums over all ranks and micro-batches, divided once by the global number of valid tokens."""

    def __init__(self, parallel: ParallelConfig, precision: PrecisionConfig, topology: Topology) -> None:
        self.parallel = parallel
        self.precision = precision
        self.topology = topology
        self.name = strategy_of(parallel, topology)
        # Set by a save under way: returns when the weights and moments may change.
        self.before_update: Callable[[], None] | None = None
        self.isolate_documents = True
        # Who looks into the next step's passes (hooks of statistics, the profiler): while there is anyone, kernels are launched one by one.
        self.watchers: set[str] = set()

    @abstractmethod
    def prepare(self, model: LanguageModel, build_optimizer: Build, seed: int) -> None:
        """Shards, materialises and initialises ``model`` (on the meta device), then builds the optimizer over its parameters."""

    @abstractmethod
    def loss(self, batch: Batch, last: bool) -> Tensor:
        """Sum of token losses of a micro-batch, fp32, for ``backward``; ``last``: the step's last, whose backward synchronises.

        Where both passes are replayed from a CUDA graph, it is not a number until ``backward`` has run them.
        """

    @abstractmethod
    def backward(self, loss: Tensor, divisor: Tensor) -> None:
        """Adds the gradient of ``loss / divisor``."""

    @abstractmethod
    def step(self, lr: float, max_norm: float, skip_if: SkipIf | None = None) -> StepResult:
        """Clips the global gradient norm to ``max_norm``, updates unless ``skip_if(norm)``, and clears the gradients."""

    @abstractmethod
    def evaluate(self, batch: Batch) -> Tensor:
        """Sum of token losses of a micro-batch, without gradients."""

    @abstractmethod
    def state(self) -> Iterator[Segment]:
        """This rank's disjoint pieces of ``model.NAME`` and ``optim.NAME.MOMENT``; ranks together cover everything once."""

    @abstractmethod
    def load(self, reader: Reader, weights_only: bool = False) -> None:
        """Takes over a checkpoint. Raises UserError when it is of another architecture, before anything is changed."""

    @abstractmethod
    def full_state_dict(self) -> dict[str, Tensor]:
        """All fp32 weights by name on rank 0's CPU; every rank must call it, the others get an empty dict."""

    def lower_projections(self, model: LanguageModel) -> None:
        """FP8 for the projections of ``model``, where configured; every engine calls it before it wraps anything."""
        if self.precision.fp8 != "off":
            names = use_fp8(model, self.precision.fp8)
            log.info("fp8: %d projections compute with %s scales", len(names), self.precision.fp8)

    def await_copy(self) -> None:
        """Called by ``step`` before it changes weights or moments: a save may still be copying them."""
        if self.before_update is not None:
            self.before_update()
            self.before_update = None

    def autocast(self) -> AbstractContextManager:
        """bf16 matmuls, where configured; the same in every engine."""
        if self.precision.compute == "fp32":
            return nullcontext()
        return torch.autocast(self.topology.device.type, dtype=torch.bfloat16)

    def inputs(self, batch: Batch) -> tuple[Tensor, Boundaries | None, Tensor]:
        """Tokens, boundaries (None if documents are not isolated) and labels on the device; copies from pinned memory do not block."""
        device = self.topology.device
        tokens, labels, seq_idx, positions = (
            t.to(device, non_blocking=True) for t in (batch.tokens, batch.labels, batch.seq_idx, batch.positions)
        )
        return tokens, Boundaries(seq_idx, positions) if self.isolate_documents else None, labels
