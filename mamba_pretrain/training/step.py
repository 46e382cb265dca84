"""One optimizer step: accumulate gradients over micro-batches, divide by the global number of valid tokens once, clip, update."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from mamba_pretrain.data.batch import Batch
    from mamba_pretrain.parallel.engine import Engine


@dataclass
class StepMetrics:
    """Results of a step.

    ``loss`` (mean over all valid tokens of all ranks) and ``grad_norm`` (before clipping) are 0-d tensors still on the device. Reading one waits
    for all that is queued there; ``read`` waits for this step only, so that the loop reads a step while the device computes the next.
    """

    loss: torch.Tensor
    grad_norm: torch.Tensor
    n_valid: torch.Tensor
    skipped: bool

    def __post_init__(self) -> None:
        self._both = torch.stack([value.detach().to(self.loss.device, torch.float64) for value in (self.loss, self.grad_norm)])
        self._copied: torch.cuda.Event | None = None
        if self._both.is_cuda:
            self._both = torch.empty(2, dtype=torch.float64, pin_memory=True).copy_(self._both, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def read(self) -> tuple[float, float]:
        """Loss and gradient norm."""
        if self._copied is not None:
            self._copied.synchronize()
        loss, norm = self._both.tolist()
        return loss, norm


def all_reduce_sum(value: torch.Tensor) -> torch.Tensor:
    """Sums a tensor over all ranks, in place; the tensor itself in a single process."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(value)
    return value


def train_step(
    engine: Engine, batches: list[Batch], lr: float, max_norm: float, skip_if: Callable[[torch.Tensor], bool] | None = None
) -> StepMetrics:
    """Runs this rank's micro-batches of one global batch and updates the weights.

    The loss is normalised per token over the whole global batch, not per micro-batch: with uneven masks the mean of means is another number
    (transformers#34191, torchtitan#2206).
    """
    device = engine.topology.device
    # `full` fills on the device; `tensor` would copy from the host, which waits for the step before.
    n_valid = all_reduce_sum(torch.full((), sum(batch.n_valid for batch in batches), dtype=torch.float64, device=device))
    divisor = n_valid.clamp(min=1.0).float()
    loss_sum = torch.zeros((), dtype=torch.float32, device=device)
    for i, batch in enumerate(batches):
        loss = engine.loss(batch, last=i == len(batches) - 1)
        engine.backward(loss, divisor)
        loss_sum += loss.detach()
    result = engine.step(lr, max_norm, skip_if)
    return StepMetrics(all_reduce_sum(loss_sum) / divisor, result.grad_norm, n_valid, result.skipped)
