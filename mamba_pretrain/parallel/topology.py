"""Which process this is among how many: one function for torchrun, deepspeed, srun and plain python."""

from __future__ import annotations

import datetime
import os
import re
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist

from data_tools.errors import UserError
from mamba_pretrain.parallel.config import ParallelConfig


@dataclass(frozen=True)
class Topology:
    """This process's place. ``launcher`` is torchrun (also deepspeed, whose variables are the same), slurm or python."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    node_rank: int
    launcher: str
    device: torch.device


def detect(environment: Mapping[str, str] = os.environ) -> Topology:
    """Reads the launcher's variables.

    torchrun and deepspeed set RANK and friends; under srun ranks come from SLURM_PROCID, the master from the node list. An allocation alone
    (an interactive shell, a batch script's own python) is one process.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        rank, world, local = (int(environment[key]) for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        local_world = int(environment.get("LOCAL_WORLD_SIZE") or environment.get("LOCAL_SIZE") or world)
        node = int(environment.get("GROUP_RANK") or environment.get("CROSS_RANK") or rank // max(1, local_world))
        return Topology(rank, local, world, local_world, node, "torchrun", _device(local))
    if int(environment.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in environment and "SLURM_STEP_ID" in environment:
        local, world = int(environment["SLURM_LOCALID"]), int(environment["SLURM_NTASKS"])
        node = int(environment["SLURM_NODEID"])
        local_world = _tasks_of_node(
            environment.get("SLURM_STEP_TASKS_PER_NODE", environment.get("SLURM_TASKS_PER_NODE", str(world))), node
        )
        return Topology(int(environment["SLURM_PROCID"]), local, world, local_world, node, "slurm", _device(local))
    return Topology(0, 0, 1, 1, 0, "python", _device(0))


def initialize(config: ParallelConfig) -> Topology:
    """Detects the topology, selects the device and joins the process group (none for a single process).

    The device is selected first: Triton kernels otherwise launch on GPU 0 (state-spaces/mamba#1003). On GPUs the group serves CPU tensors through
    gloo and GPU tensors through NCCL.
    """
    topology = detect()
    if topology.device.type == "cuda":
        torch.cuda.set_device(topology.device)
    check_strategy(config.strategy, topology)
    if (topology.world_size > 1 or strategy_of(config, topology).startswith("zero")) and not dist.is_initialized():
        for key, value in rendezvous(topology, os.environ).items():
            os.environ.setdefault(key, value)
        backend = "cpu:gloo,cuda:nccl" if topology.device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend, rank=topology.rank, world_size=topology.world_size, timeout=datetime.timedelta(minutes=config.timeout_minutes)
        )
    return topology


class Leaving(Protocol):
    """Something that holds on to the process group's communicators."""

    def close(self) -> None:
        """Lets go of them."""


_leaving: weakref.WeakSet[Leaving] = weakref.WeakSet()


def close_before_leaving(holder: Leaving) -> None:
    """Has ``shutdown`` close ``holder``, if it still exists, before it leaves the process group."""
    _leaving.add(holder)


def shutdown(failed: bool = False) -> None:
    """Leaves the process group. NCCL waits for ever for communicators that a CUDA graph still holds, so holders are closed first.

    ``failed``: peers may be gone or wait in a collective, and NCCL would wait for them; the process is about to end and takes the group along.
    """
    for holder in list(_leaving):
        holder.close()
    if failed and torch.cuda.is_available():
        return
    if dist.is_initialized():
        dist.destroy_process_group()


def strategy_of(config: ParallelConfig, topology: Topology) -> str:
    """The strategy with ``auto`` decided."""
    if config.strategy == "auto":
        return "single" if topology.world_size == 1 else "fsdp2"
    return config.strategy


def check_strategy(strategy: str, topology: Topology) -> None:
    """Refuses a strategy that does not fit the number of processes."""
    if strategy == "single" and topology.world_size > 1:
        raise UserError(f"parallel.strategy=single cannot use {topology.world_size} processes; start one, or use ddp, fsdp2 or zero2")
    if strategy in ("ddp", "hsdp") and topology.world_size == 1:
        raise UserError(
            f"parallel.strategy={strategy} needs several processes, but there is one; start with torchrun --nproc-per-node N "
            "-m mamba_pretrain train ..., or set parallel.strategy=single"
        )


def rendezvous(topology: Topology, environment: Mapping[str, str]) -> dict[str, str]:
    """MASTER_ADDR, MASTER_PORT and rank variables. Under Slurm the first node of the list, and a port that differs with every restart."""
    address, port = "127.0.0.1", 29500
    if topology.launcher == "slurm":
        nodes = environment.get("SLURM_STEP_NODELIST") or environment["SLURM_JOB_NODELIST"]
        address = environment.get("SLURM_LAUNCH_NODE_IPADDR_OVERRIDE") or first_node(nodes)
        job, restart = int(environment["SLURM_JOB_ID"]), int(environment.get("SLURM_RESTART_COUNT", "0"))
        port = 20000 + (job * 31 + restart * 7 + int(environment.get("SLURM_STEP_ID", "0"))) % 20000
    elif topology.launcher == "python":
        port = _free_port()
    names = {"RANK": topology.rank, "WORLD_SIZE": topology.world_size, "LOCAL_RANK": topology.local_rank}
    return {"MASTER_ADDR": address, "MASTER_PORT": str(port), **{key: str(value) for key, value in names.items()}}


def first_node(nodelist: str) -> str:
    """The first host of a Slurm node list: ``gpu[003-007,9],login`` gives ``gpu003``."""
    match = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\])?([^,]*)", nodelist)
    if match is None:
        raise UserError(f"the node list {nodelist!r} of Slurm cannot be read; set MASTER_ADDR by hand")
    return f"{match[1]}{match[2] or ''}{match[3]}"


def _tasks_of_node(text: str, node: int) -> int:
    """Tasks of the node-th node in Slurm's form ``2(x3),1``."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match:
            counts += [int(match[1])] * int(match[2] or 1)
    return counts[node] if node < len(counts) else 1


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    # With one visible GPU per task (srun --gpus-per-task) every local rank's device is number 0.
    return torch.device("cuda", local_rank % torch.cuda.device_count())


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
