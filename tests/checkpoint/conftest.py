"""A stand-in engine whose state is a few tensors, cut among processes as FSDP2 and ZeRO cut theirs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from mamba_pretrain.checkpoint.config import CheckpointConfig
from mamba_pretrain.checkpoint.store import CheckpointStore
from mamba_pretrain.parallel.portable import Segment, split_range
from mamba_pretrain.parallel.topology import Topology

SHAPES = {"model.embedding.weight": (7, 3), "model.layers.0.mixer.A_log": (5,), "optim.embedding.weight.exp_avg": (7, 3)}


def tensors(seed: int) -> dict[str, torch.Tensor]:
    """Full tensors of a state."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


@dataclass
class StandIn:
    """Rank ``rank`` of ``world`` owns a contiguous share of every tensor."""

    full: dict[str, torch.Tensor]
    rank: int = 0
    world: int = 1
    name: str = "stand-in"
    before_update: Callable[[], None] | None = None

    def state(self):
        for name, tensor in self.full.items():
            offset, length = split_range(tensor.numel(), self.rank, self.world)
            if length:
                yield Segment(name, tuple(tensor.shape), offset, tensor.reshape(-1)[offset : offset + length])


def topology(rank: int = 0, world: int = 1) -> Topology:
    return Topology(rank, rank, world, world, 0, "python", torch.device("cpu"))


@pytest.fixture
def root(tmp_path):
    return tmp_path / "checkpoints"


@pytest.fixture
def make_store(root):
    """A store of one process, with settings."""

    def make(**settings):
        return CheckpointStore(root, CheckpointConfig(**settings), topology())

    return make


@pytest.fixture
def make_engine():
    """A stand-in engine holding the state of a seed, and that state."""

    def make(seed: int = 0):
        full = tensors(seed)
        return StandIn(full), full

    return make


@pytest.fixture
def saved(make_store, make_engine, root):
    """A folder with the checkpoints of steps 10, 20 and 30, whose states are those of seeds 10, 20 and 30."""
    store = make_store()
    for step in (10, 20, 30):
        store.save(make_engine(step)[0], step, {"tokens": 100 * step})
    store.wait()
    return root
