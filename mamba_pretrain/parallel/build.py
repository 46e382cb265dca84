"""The choice of an engine."""

from __future__ import annotations

import logging

import torch

from data_tools.errors import UserError
from mamba_pretrain.ops import fp8
from mamba_pretrain.parallel.config import ParallelConfig, PrecisionConfig, graphs_unsupported
from mamba_pretrain.parallel.engine import Engine
from mamba_pretrain.parallel.topology import Topology, strategy_of

log = logging.getLogger(__name__)


def build_engine(parallel: ParallelConfig, precision: PrecisionConfig, topology: Topology) -> Engine:
    """The engine of ``parallel.strategy``. Raises UserError where it cannot do what ``parallel`` asks for."""
    strategy = strategy_of(parallel, topology)
    check_cuda_graphs(parallel, strategy, topology)
    check_fp8(precision, topology.device)
    if strategy.startswith("zero"):
        from mamba_pretrain.parallel.deepspeed_engine import DeepSpeedEngine

        return DeepSpeedEngine(parallel, precision, topology)
    from mamba_pretrain.parallel.torch_engine import TorchEngine

    return TorchEngine(parallel, precision, topology)


def check_cuda_graphs(parallel: ParallelConfig, strategy: str, topology: Topology) -> None:
    """Refuses graphs where they cannot be had and the config insists on them."""
    why = graphs_unsupported(parallel, strategy, topology.device.type) if parallel.cuda_graphs == "on" else None
    if why is not None:
        raise UserError(f"parallel.cuda_graphs=on needs {why}; set parallel.cuda_graphs=auto")


def check_fp8(precision: PrecisionConfig, device: torch.device) -> None:
    """Refuses FP8 where the device has no such matmuls; a CPU emulates them, which is slow."""
    if precision.fp8 == "off":
        return
    if (why := fp8.unsupported(precision.fp8, device)) is not None:
        raise UserError(f"precision.fp8={precision.fp8} cannot be used: {why}")
    if device.type == "cpu":
        log.warning("precision.fp8=%s is emulated on a CPU: the same rounding, slower than bf16", precision.fp8)
