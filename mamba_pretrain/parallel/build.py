"""The choice of an engine."""

from __future__ import annotations

from data_tools.errors import UserError
from mamba_pretrain.parallel.config import ParallelConfig, PrecisionConfig, graphs_unsupported
from mamba_pretrain.parallel.engine import Engine
from mamba_pretrain.parallel.topology import Topology, strategy_of


def build_engine(parallel: ParallelConfig, precision: PrecisionConfig, topology: Topology) -> Engine:
    """The engine of ``parallel.strategy``. Raises UserError where it cannot do what ``parallel`` asks for."""
    strategy = strategy_of(parallel, topology)
    check_cuda_graphs(parallel, strategy, topology)
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
