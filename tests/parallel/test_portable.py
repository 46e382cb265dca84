"""Range arithmetic, and checkpoints that do not fit."""

from __future__ import annotations

import pytest
import torch

from data_tools.errors import UserError
from mamba_pretrain.parallel.portable import check_moments, check_shapes, pieces, split_range


class Shapes:
    """A reader with shapes only."""

    source = "runs/x"

    def __init__(self, **shapes):
        self._shapes = {name.replace("__", "."): shape for name, shape in shapes.items()}

    def shapes(self):
        return self._shapes


@pytest.mark.parametrize("numel", [0, 1, 2, 7, 100])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_shares_cover_everything_once(numel, world):
    ranges = [split_range(numel, rank, world) for rank in range(world)]
    assert [i for offset, length in ranges for i in range(offset, offset + length)] == list(range(numel))
    assert max(length for _, length in ranges) - min(length for _, length in ranges) <= 1


def test_pieces_of_a_replicated_tensor():
    tensor = torch.arange(10.0).view(2, 5)
    found = [piece for rank in range(3) for piece in pieces("model.w", tensor, rank, 3)]
    assert torch.equal(torch.cat([piece.data for piece in found]), tensor.reshape(-1))
    assert {piece.shape for piece in found} == {(2, 5)}
    assert list(pieces("optim.w.step", torch.tensor(3.0), 0, 3)) == [], "one process writes a counter"


def test_the_same_architecture():
    check_shapes(Shapes(model__w=(2, 3), optim__w__step=()), {"w": (2, 3)})


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        ({"model__w": (2, 4)}, r"w is \(2, 4\) there and \(2, 3\) in"),
        ({}, "w is absent there"),
        ({"model__w": (2, 3), "model__v": (1,)}, r"v is \(1,\) there and absent in"),
    ],
)
def test_another_architecture(shapes, said):
    with pytest.raises(UserError, match=f"runs/x is of another architecture: {said}"):
        check_shapes(Shapes(**shapes), {"w": (2, 3)})


def test_moments():
    adamw = {"w": ("exp_avg", "step")}
    assert check_moments(Shapes(model__w=(2,), optim__w__exp_avg=(2,), optim__w__step=()), adamw)
    assert not check_moments(Shapes(model__w=(2,)), adamw), "imported weights have none"


@pytest.mark.parametrize("shapes", [{"optim__w__momentum_buffer": (2,)}, {"optim__v__exp_avg": (2,), "optim__v__step": ()}])
def test_another_optimizer(shapes):
    with pytest.raises(UserError, match=r"another optimizer: for w it holds .* instead of exp_avg, step"):
        check_moments(Shapes(**shapes), {"w": ("exp_avg", "step")})
