"""The cross-entropy's own kernel on a CPU against PyTorch's arithmetic on the same logits."""

from __future__ import annotations

import pytest
import torch

from mamba_pretrain.ops import cross_entropy
from mamba_pretrain.ops import cuda_softmax_kernels as kernels

IGNORED = -100


@pytest.fixture
def run(emulated_kernels, monkeypatch):
    """Losses and what is left in the logits, by blocks of ``warps``."""
    monkeypatch.setattr(kernels, "multiprocessors", lambda device: 3)

    def softmax_gradient(logits, targets, valid, gradient=True, warps=2, ignore_index=IGNORED):
        monkeypatch.setattr(kernels, "WARPS", warps)
        kernels._kernel.cache_clear()
        logits, losses = logits.clone(), torch.full((len(logits),), float("nan"))
        kernels.softmax_gradient(logits, targets, losses, ignore_index, valid, gradient)
        return losses, logits

    yield softmax_gradient
    kernels._kernel.cache_clear()


def draw(rows=8, columns=1096, valid=1089, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(rows, columns, generator=generator)).to(dtype)
    targets = torch.randint(0, valid, (rows,), generator=generator)
    targets[1], targets[2], targets[-1] = IGNORED, valid - 1, 0
    return logits, targets


def check(found, logits, targets, valid):
    losses, gradient = found
    expected, exact = cross_entropy._losses(logits.float(), targets, IGNORED, valid, gradient=True)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient.float(), exact, rtol=torch.finfo(logits.dtype).eps, atol=1e-6)
    assert torch.count_nonzero(gradient[:, valid:]) == 0
    assert torch.count_nonzero(gradient[1]) == 0


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_losses_and_gradients(run, dtype):
    logits, targets = draw(dtype=dtype)
    check(run(logits, targets, 1089), logits, targets, 1089)


@pytest.mark.parametrize(
    ("columns", "valid", "warps"),
    [(8, 8, 1), (8, 3, 2), (512, 512, 2), (520, 520, 2), (1096, 200, 2), (1096, 1096, 32)],
    ids=["one-vector", "part-of-one", "every-lane-alike", "one-vector-more", "lanes-of-padding", "as-many-warps-as-there-are"],
)
def test_shapes(run, columns, valid, warps):
    logits, targets = draw(columns=columns, valid=valid)
    check(run(logits, targets, valid, warps=warps), logits, targets, valid)


@pytest.mark.parametrize("rows", [3, 4, 7])
def test_blocks_that_walk_over_unequal_numbers_of_rows(run, rows):
    logits, targets = draw(rows=rows)
    check(run(logits, targets, 1089), logits, targets, 1089)


def test_the_loss_alone_leaves_the_logits(run):
    logits, targets = draw()
    losses, left = run(logits, targets, 1089, gradient=False)
    assert torch.equal(left, logits)
    assert torch.equal(losses, run(logits, targets, 1089)[0])


def test_another_ignored_index(run):
    logits, targets = draw()
    for a, b in zip(run(logits, targets.masked_fill(targets == IGNORED, 5), 1089, ignore_index=5), run(logits, targets, 1089), strict=True):
        assert torch.equal(a[1], b[1])


def test_rows_of_a_wider_table(run):
    logits, targets = draw()
    wide = torch.full((8, 1200), 7.0).bfloat16()
    wide[:, 16:1112] = logits
    losses = torch.empty(8)
    expected = run(logits, targets, 1089)
    kernels.softmax_gradient(wide[:, 16:1112], targets, losses, IGNORED, 1089, True)
    assert torch.equal(losses, expected[0])
    assert torch.equal(wide[:, 16:1112], expected[1])
    assert torch.all(wide[:, :16] == 7)
    assert torch.all(wide[:, 1112:] == 7)


def test_padding_may_hold_anything(run):
    logits, targets = draw()
    expected = run(logits, targets, 1089)
    for value in (float("nan"), float("inf"), 1e4):
        logits[:, 1089:] = value
        assert all(torch.equal(a, b) for a, b in zip(run(logits, targets, 1089), expected, strict=True))


def test_logits_that_are_not_finite(run):
    logits, targets = draw()
    logits[0, 17], logits[1, 5], logits[3, 9], logits[4] = float("nan"), float("nan"), float("inf"), float("-inf")
    logits[4, targets[4]] = 0
    losses, gradient = run(logits, targets, 1089)
    assert losses[0].isnan()
    assert losses[3].isnan()
    assert losses[1] == losses[4] == 0, "an ignored row, and one whose target is all there is"
    assert torch.count_nonzero(gradient[[1, 4]]) == 0
    assert torch.count_nonzero(gradient[:, 1089:]) == 0


def test_extreme_logits(run):
    logits, targets = draw()
    check(run(1000 * logits, targets, 1089), 1000 * logits, targets, 1089)


def test_a_real_vocabulary(run):
    logits, targets = draw(rows=4, columns=50304, valid=50277)
    check(run(logits, targets, 50277, warps=kernels.WARPS), logits, targets, 50277)
