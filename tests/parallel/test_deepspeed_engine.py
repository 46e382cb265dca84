"""ZeRO in one process: what it refuses, and what becomes of a gradient that is not finite."""

from __future__ import annotations

import os

import pytest
import torch

from data_tools.errors import UserError
from mamba_pretrain.parallel import topology as ranks
from mamba_pretrain.parallel.config import ParallelConfig
from mamba_pretrain.training.step import train_step


@pytest.fixture(scope="module")
def alone():
    """A process group of one; one for all tests, since DeepSpeed remembers the first it meets."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    assert not any(name in os.environ for name in names)
    topology = ranks.initialize(ParallelConfig(strategy="zero2"))
    yield topology
    ranks.shutdown()
    for name in names:
        os.environ.pop(name)


def test_muon_is_refused(worker, alone):
    with pytest.raises(UserError, match=r"only optim\.name=adamw can update; use fsdp2"):
        worker.build(worker.Job("x", "zero2", optim={"name": "muon"}), alone)


def test_groups_that_do_not_divide_the_processes(worker, alone):
    with pytest.raises(UserError, match="zero_hpz_partition_size 2 does not divide the 1 processes"):
        worker.build(worker.Job("x", "zero3", parallel={"zero_hpz_partition_size": 2}), alone)


@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3"])
def test_a_gradient_that_is_not_finite_never_reaches_the_weights(worker, alone, strategy):
    engine, _, _ = worker.build(worker.Job("x", strategy), alone)
    batches = worker.my_batches(0, alone, 12)
    train_step(engine, batches, 1e-2, 0.5)
    before = engine.full_state_dict()
    loss = engine.loss(batches[0], last=True)
    engine.backward(loss * torch.inf, torch.tensor(1.0))
    result = engine.step(1e-2, 0.5)
    assert result.skipped
    assert not torch.isfinite(result.grad_norm)
    assert all(torch.equal(tensor, before[name]) for name, tensor in engine.full_state_dict().items())
    found = train_step(engine, batches, 1e-2, 0.5)
    assert not found.skipped
    assert torch.isfinite(found.grad_norm)


def test_segments_cover_every_tensor_once(worker, alone):
    for strategy in ("zero1", "zero3"):
        engine, model, _ = worker.build(worker.Job("x", strategy), alone)
        train_step(engine, worker.my_batches(0, alone, 12), 1e-2, 0.5)
        sizes: dict[str, int] = {}
        for segment in engine.state():
            sizes[segment.name] = sizes.get(segment.name, 0) + segment.data.numel()
        for name, shape in model.parameter_shapes.items():
            numel = torch.Size(shape).numel()
            assert [sizes[f"{kind}.{name}{m}"] for kind, m in (("model", ""), ("optim", ".exp_avg"), ("optim", ".exp_avg_sq"))] == [
                numel
            ] * 3
            assert sizes[f"optim.{name}.step"] == 1
