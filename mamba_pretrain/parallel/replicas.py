"""Sums gradients over processes that each hold the whole model, while the backward pass goes on.

What torch's DistributedDataParallel does, without its decisions in Python at every pass: everything here is launched in a fixed order, so that a
CUDA graph can hold it. Gradients are summed where they lie, in the order in which the backward pass completes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import _coalescing_manager

# Large enough for a network's full speed, small enough that the last sum, which nothing hides, is short.
BUCKET_BYTES = 64 << 20


class Replicas:
    """Sums buckets of gradients in the backward pass that ``expect`` announces; ``finish`` makes what follows wait for the sums."""

    def __init__(self, parameters: Sequence[nn.Parameter], device: torch.device, bucket_bytes: int = BUCKET_BYTES) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._buckets = _buckets(parameters, bucket_bytes)
        self._bucket_of = {parameter: i for i, bucket in enumerate(self._buckets) for parameter in bucket}
        self._missing: list[int] | None = None  # gradients that each bucket waits for; None: this pass is not summed
        self._running: list[Any] = []
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._ready)

    def expect(self, last: bool) -> None:
        """Announces a backward pass; ``last``: the step's last, after which gradients are summed."""
        self._missing = [len(bucket) for bucket in self._buckets] if last else None

    def _ready(self, parameter: Tensor) -> None:
        if self._missing is None:
            return
        index = self._bucket_of[parameter]  # type: ignore[index]
        self._missing[index] -= 1
        if self._missing[index] == 0:
            self._sum([p.grad for p in self._buckets[index] if p.grad is not None])

    def _sum(self, gradients: list[Tensor]) -> None:
        if self._stream is None:
            with _coalescing_manager(async_ops=True) as work:
                for gradient in gradients:
                    dist.all_reduce(gradient)
            self._running.append(work)
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream), _coalescing_manager():
            for gradient in gradients:
                dist.all_reduce(gradient)

    def finish(self) -> None:
        """After the backward pass. Raises RuntimeError if a parameter got no gradient: other processes would wait for its sum."""
        missing, self._missing = self._missing, None
        if missing is None:
            return
        if any(missing):
            raise RuntimeError(f"{sum(missing)} parameters got no gradient in the backward pass; every process must give one for each")
        for work in self._running:
            work.wait()
        self._running.clear()
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)


def _buckets(parameters: Sequence[nn.Parameter], bucket_bytes: int) -> list[list[nn.Parameter]]:
    """Parameters from the last to the first, as the backward pass completes them, in groups of about ``bucket_bytes`` and one dtype."""
    buckets: list[list[nn.Parameter]] = []
    size = 0
    for parameter in reversed(parameters):
        if not buckets or size >= bucket_bytes or buckets[-1][0].dtype != parameter.dtype:
            buckets.append([])
            size = 0
        buckets[-1].append(parameter)
        size += parameter.numel() * parameter.element_size()
    return buckets
