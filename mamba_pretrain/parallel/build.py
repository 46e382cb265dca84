"""The choice of an engine."""

from __future__ import annotations

import logging

import torch

from data_tools.errors import UserError
from mamba_pretrain.ops import fp8
from mamba_pretrain.parallel.config import ParallelConfig, PrecisionConfig
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
    """Refuses graphs without a GPU, and where gradients are exchanged during the backward pass.

    A recorded exchange hangs if one process replays it while another, whose recording failed, launches its own.
    """
    if parallel.cuda_graphs != "on":
        return
    if strategy != "single":
        raise UserError(f"parallel.cuda_graphs=on needs parallel.strategy=single, not {strategy}; set parallel.cuda_graphs=auto")
    if topology.device.type != "cuda":
        raise UserError(f"parallel.cuda_graphs=on needs a CUDA device, not {topology.device.type}; set parallel.cuda_graphs=auto")


def check_fp8(precision: PrecisionConfig, device: torch.device) -> None:
    """Refuses FP8 where the device has no such matmuls; a CPU emulates them, which is slow."""
    if precision.fp8 == "off":
        return
    if (why := fp8.unsupported(precision.fp8, device)) is not None:
        raise UserError(f"precision.fp8={precision.fp8} cannot be used: {why}")
    if device.type == "cpu":
        log.warning("precision.fp8=%s is emulated on a CPU: the same rounding, slower than bf16", precision.fp8)
