"""Loading, in one process: what fits, what does not, and what a refusal leaves behind."""

from __future__ import annotations

import math

import pytest
import torch

from data_tools.errors import UserError
from mamba_pretrain.checkpoint.config import CheckpointConfig
from mamba_pretrain.checkpoint.convert import write_weights
from mamba_pretrain.checkpoint.reading import open_checkpoint
from mamba_pretrain.checkpoint.store import CheckpointStore
from mamba_pretrain.ops import weight_copy
from mamba_pretrain.parallel import torch_engine
from mamba_pretrain.parallel.config import ParallelConfig, PrecisionConfig
from mamba_pretrain.parallel.topology import Topology
from mamba_pretrain.training.step import train_step

ALONE = Topology(0, 0, 1, 1, 0, "python", torch.device("cpu"))


@pytest.fixture
def make(worker):
    """An engine of one process that has done some steps."""

    def make(steps=0, model="mamba1", **optim):
        engine, _, _ = worker.build(worker.Job("x", "single", model, optim=optim), ALONE)
        for step in range(steps):
            train(engine, worker, step)
        return engine

    return make


def train(engine, worker, step):
    return float(train_step(engine, worker.my_batches(step, ALONE, 12), 1e-2, 0.5).loss)


def saved(engine, folder, step):
    store = CheckpointStore(folder / "checkpoints", CheckpointConfig(async_save=False), ALONE)
    store.save(engine, step, {})
    return open_checkpoint(folder).reader


def weights_of(engine):
    return {name: tensor.clone() for name, tensor in engine.full_state_dict().items()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_loaded_engine_continues_bit_for_bit(make, worker, tmp_path):
    first = make(steps=2)
    reader = saved(first, tmp_path, 2)
    expected = [train(first, worker, step) for step in (2, 3)]
    second = make()
    second.load(reader)
    assert [train(second, worker, step) for step in (2, 3)] == expected
    assert equal(weights_of(first), weights_of(second))


def test_loading_again_after_training_on_is_a_rollback(make, worker, tmp_path):
    engine = make(steps=2)
    reader = saved(engine, tmp_path, 2)
    expected = [train(engine, worker, step) for step in (2, 3)]
    engine.load(reader)
    assert [train(engine, worker, step) for step in (2, 3)] == expected


def test_weights_only_starts_with_fresh_moments(make, worker, tmp_path):
    reader = saved(make(steps=2), tmp_path, 2)
    fresh, continued = make(), make()
    fresh.load(reader, weights_only=True)
    continued.load(reader)
    assert equal(weights_of(fresh), weights_of(continued))
    train(fresh, worker, 2), train(continued, worker, 2)
    assert not equal(weights_of(fresh), weights_of(continued))


def test_imported_weights_have_no_moments_to_load(make, worker, tmp_path):
    source = make(steps=1)
    write_weights(tmp_path, weights_of(source), {})
    engine, other = make(), make()
    engine.load(open_checkpoint(tmp_path).reader)
    other.load(open_checkpoint(tmp_path).reader, weights_only=True)
    train(engine, worker, 1), train(other, worker, 1)
    assert equal(weights_of(engine), weights_of(other))


def test_another_architecture_changes_nothing(make, tmp_path):
    reader = saved(make(steps=1), tmp_path, 1)
    engine = make(steps=1, model="hybrid")
    before = weights_of(engine)
    with pytest.raises(UserError, match=r"of another architecture: layers\.0\.mixer\.dt_bias is"):
        engine.load(reader)
    assert equal(weights_of(engine), before)


def test_another_optimizer_changes_nothing(make, tmp_path):
    reader = saved(make(steps=1), tmp_path, 1)
    engine = make(name="muon")
    before = weights_of(engine)
    with pytest.raises(UserError, match=r"another optimizer: .* momentum_buffer"):
        engine.load(reader)
    assert equal(weights_of(engine), before)
    engine.load(reader, weights_only=True)


def test_muon_continues_bit_for_bit(make, worker, tmp_path):
    first = make(steps=2, name="muon")
    reader = saved(first, tmp_path, 2)
    second = make(name="muon")
    second.load(reader)
    assert train(second, worker, 2) == train(first, worker, 2)
    assert equal(weights_of(first), weights_of(second))


def test_shard_groups_that_do_not_divide_the_processes(worker):
    three = Topology(0, 0, 3, 3, 0, "python", torch.device("cpu"))
    with pytest.raises(UserError, match="hsdp_shard_size 2 does not divide the 3 processes"):
        worker.build(worker.Job("x", "hsdp", parallel={"hsdp_shard_size": 2}), three)


def test_the_norm_is_that_before_clipping_and_clipping_works(make, worker):
    engine = make()
    batches = worker.my_batches(0, ALONE, 12)
    divisor = torch.tensor(float(sum(batch.n_valid for batch in batches)))
    seen = {}

    def look(norm):
        seen["judged"] = float(norm)
        return False

    for batch in batches:
        engine.backward(engine.loss(batch, last=True), divisor)
    result = engine.step(1e-2, 0.1, look)
    squares = sum(float(moments["exp_avg_sq"].double().sum()) for moments in engine.optimizer.state.values())
    clipped = math.sqrt(squares / (1 - engine.optimizer.param_groups[0]["betas"][1]))  # what the first update was made of
    assert float(result.grad_norm) == seen["judged"] > 0.2
    assert clipped == pytest.approx(0.1, rel=1e-4)


PLACES = [ALONE, pytest.param(Topology(0, 0, 1, 1, 0, "python", torch.device("cuda")), marks=pytest.mark.gpu)]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.device.type)
def test_kept_bf16_weights_follow_steps_and_loads(worker, tmp_path, monkeypatch, place, optimizer):
    """Losses are those of weights that are cast at every use, through updates, a rollback and evaluations."""

    def losses(folder):
        engine, _, _ = worker.build(worker.Job("x", "single", "hybrid", "bf16", optim={"name": optimizer}), place)
        found = [train(engine, worker, step) for step in range(4)]
        reader = saved(engine, folder, 4)
        found += [train(engine, worker, step) for step in (4, 5)]
        engine.load(reader)
        found += [float(engine.evaluate(worker.my_batches(9, ALONE, 12)[0]))]
        return [*found, *(train(engine, worker, step) for step in (4, 5))], engine

    kept, engine = losses(tmp_path / "kept")
    assert len(engine._copied) == len(torch_engine.cast_weights(engine.model, PrecisionConfig())) > 4
    if place.device.type == "cuda" and optimizer == "adamw":  # where the optimizer's kernel writes them
        assert all(weight_copy.valid(weight) is not None for weight in engine._copied)
    tolerance = 1e-5 if place.device.type == "cuda" else 0  # attention adds in no fixed order there
    assert kept[4:6] == pytest.approx(kept[7:], rel=tolerance)
    monkeypatch.setattr(torch_engine, "keeps_copies", lambda *_: False)
    cast, engine = losses(tmp_path / "cast")
    assert engine._copied == []
    assert kept == pytest.approx(cast, rel=tolerance)


@pytest.mark.parametrize(
    ("precision", "parallel", "kept"),
    [
        ({}, {}, True),
        ({"compute": "fp32"}, {}, False),
        ({}, {"activation_checkpointing": "selective"}, False),
    ],
)
def test_weights_are_kept_where_that_costs_no_memory(precision, parallel, kept):
    configs = ParallelConfig(**parallel), PrecisionConfig(**precision)
    assert torch_engine.keeps_copies(*configs, sharded=False) == kept
    assert not torch_engine.keeps_copies(*configs, sharded=True)
