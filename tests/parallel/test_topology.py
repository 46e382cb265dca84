"""Ranks from every launcher, and strategies that do not fit them."""

from __future__ import annotations

import pytest
import torch

from data_tools.errors import UserError
from mamba_pretrain.parallel.config import ParallelConfig
from mamba_pretrain.parallel.topology import Topology, check_strategy, detect, first_node, rendezvous, strategy_of

TORCHRUN = {
    "RANK": "5",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "8",
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_RANK": "1",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "1234",
}
SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_NTASKS": "7",
    "SLURM_STEP_ID": "0",
    "SLURM_JOB_ID": "1234567",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3),1",
    "SLURM_STEP_NODELIST": "gpu[003-005,9]",
    "SLURM_JOB_NODELIST": "gpu[003-005,9]",
}


def place(topology):
    return topology.rank, topology.local_rank, topology.world_size, topology.local_world_size, topology.node_rank, topology.launcher


def alone(world=1):
    return Topology(0, 0, world, world, 0, "python", torch.device("cpu"))


def test_torchrun():
    assert place(detect(TORCHRUN)) == (5, 1, 8, 4, 1, "torchrun")


def test_deepspeed_launcher():
    """It sets LOCAL_SIZE and CROSS_RANK instead of torchrun's names."""
    variables = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_SIZE": "2", "CROSS_RANK": "1"}
    assert place(detect(variables)) == (3, 1, 4, 2, 1, "torchrun")


def test_srun():
    assert place(detect(SLURM)) == (5, 1, 7, 2, 2, "slurm")
    assert place(detect({**SLURM, "SLURM_NODEID": "3"}))[3] == 1, "the last node has one task"


def test_torchrun_inside_a_slurm_job_wins():
    assert detect({**SLURM, **TORCHRUN}).launcher == "torchrun"


@pytest.mark.parametrize("variables", [{}, {k: v for k, v in SLURM.items() if k != "SLURM_STEP_ID"}, {**SLURM, "SLURM_NTASKS": "1"}])
def test_plain_python_also_inside_an_allocation(variables):
    assert place(detect(variables)) == (0, 0, 1, 1, 0, "python")


def test_rendezvous_under_slurm_moves_with_every_restart():
    topology = detect(SLURM)
    found = [rendezvous(topology, {**SLURM, "SLURM_RESTART_COUNT": str(n)}) for n in range(3)]
    assert {f["MASTER_ADDR"] for f in found} == {"gpu003"}
    assert len({f["MASTER_PORT"] for f in found}) == 3
    assert all(1024 < int(f["MASTER_PORT"]) < 65536 for f in found)
    assert found[0] == rendezvous(topology, SLURM), "SLURM_RESTART_COUNT is unset on the first run"


@pytest.mark.parametrize(
    ("nodelist", "node"),
    [("gpu[003-007,9],login", "gpu003"), ("login", "login"), ("a,b", "a"), ("n[1,3]-ib", "n1-ib"), ("r1-n[07]", "r1-n07")],
)
def test_first_node(nodelist, node):
    assert first_node(nodelist) == node


def test_auto_strategy():
    assert strategy_of(ParallelConfig(), alone()) == "single"
    assert strategy_of(ParallelConfig(), alone(2)) == "fsdp2"
    assert strategy_of(ParallelConfig(strategy="zero2"), alone(2)) == "zero2"


@pytest.mark.parametrize(
    ("strategy", "world", "said"), [("single", 2, "2 processes"), ("ddp", 1, "needs several"), ("hsdp", 1, "torchrun")]
)
def test_strategies_that_do_not_fit(strategy, world, said):
    with pytest.raises(UserError, match=said):
        check_strategy(strategy, alone(world))


@pytest.mark.parametrize(("strategy", "world"), [("single", 1), ("fsdp2", 1), ("zero3", 1), ("ddp", 2), ("auto", 3)])
def test_strategies_that_fit(strategy, world):
    check_strategy(strategy, alone(world))
