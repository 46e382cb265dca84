"""The choice of an engine."""

from __future__ import annotations

from mamba_pretrain.parallel.config import ParallelConfig, PrecisionConfig
from mamba_pretrain.parallel.engine import Engine
from mamba_pretrain.parallel.topology import Topology, strategy_of


def build_engine(parallel: ParallelConfig, precision: PrecisionConfig, topology: Topology) -> Engine:
    """The engine of ``parallel.strategy``."""
    if strategy_of(parallel, topology).startswith("zero"):
        from mamba_pretrain.parallel.deepspeed_engine import DeepSpeedEngine

        return DeepSpeedEngine(parallel, precision, topology)
    from mamba_pretrain.parallel.torch_engine import TorchEngine

    return TorchEngine(parallel, precision, topology)
