"""FP8 by config: what is refused, and what a training loses by it."""

from __future__ import annotations

import logging
import statistics

import pytest
import torch
from pydantic import ValidationError

from data_tools.errors import UserError
from mamba_pretrain.ops import fp8
from mamba_pretrain.parallel import build
from mamba_pretrain.parallel.config import PrecisionConfig
from mamba_pretrain.parallel.topology import Topology
from mamba_pretrain.training.step import train_step

ALONE = Topology(0, 0, 1, 1, 0, "python", torch.device("cpu"))
SCALINGS = ("tensorwise", "rowwise", "blockwise")


def test_it_is_off_by_default_and_yaml_may_say_so():
    assert PrecisionConfig().fp8 == "off"
    assert PrecisionConfig(fp8=False).fp8 == "off"


@pytest.mark.parametrize("value", [True, "e4m3", "columnwise"])
def test_unknown_words_are_refused(value):
    with pytest.raises(ValidationError, match="fp8"):
        PrecisionConfig(fp8=value)


def test_it_takes_the_place_of_bf16():
    with pytest.raises(ValidationError, match="fp8=rowwise replaces matmuls in bf16; set compute=bf16 or fp8=off"):
        PrecisionConfig(compute="fp32", fp8="rowwise")


def test_a_device_without_such_matmuls(monkeypatch):
    monkeypatch.setattr(fp8, "unsupported", lambda scaling, device: "it needs a GPU of compute capability 8.9 or newer, and this has 8.0")
    with pytest.raises(UserError, match=r"precision\.fp8=rowwise cannot be used: it needs a GPU of compute capability 8\.9"):
        build.check_fp8(PrecisionConfig(fp8="rowwise"), torch.device("cuda"))
    build.check_fp8(PrecisionConfig(), torch.device("cuda"))


def test_a_cpu_emulates_it_and_says_so(worker, caplog):
    with caplog.at_level(logging.INFO):
        worker.build(worker.Job("x", "single", "aligned", compute="bf16", fp8="rowwise"), ALONE)
    assert "emulated on a CPU" in caplog.text
    assert "fp8: 12 projections compute with rowwise scales" in caplog.text


def losses(worker, steps, **fields):
    engine, _, _ = worker.build(worker.Job("x", "single", "aligned", compute="bf16", **fields), ALONE)
    return [float(train_step(engine, worker.my_batches(step, ALONE, 4), 3e-3, 1.0).loss) for step in range(steps)]


@pytest.mark.slow
def test_losses_of_a_training_are_those_of_bf16(worker):
    """The mean of the last losses of 300 steps."""
    base = losses(worker, 300)
    assert base[-1] < base[0] / 2, "the model must learn, or equal losses say little"
    for scaling in SCALINGS:
        found = losses(worker, 300, fp8=scaling)
        assert statistics.mean(found[-30:]) == pytest.approx(statistics.mean(base[-30:]), rel=0.005), scaling


@pytest.mark.parametrize("scaling", SCALINGS)
def test_first_losses_are_those_of_bf16(worker, scaling):
    assert losses(worker, 12, fp8=scaling) == pytest.approx(losses(worker, 12), rel=0.005)


@pytest.mark.parametrize("mode", ["block", "selective"])
def test_recomputing_changes_nothing(worker, mode):
    parallel = {"activation_checkpointing": mode}
    assert losses(worker, 3, fp8="rowwise", parallel=parallel) == losses(worker, 3, fp8="rowwise")


def test_evaluation_computes_in_bf16(worker):
    engines = [worker.build(worker.Job("x", "single", "aligned", compute="bf16", fp8=name), ALONE)[0] for name in ("off", "rowwise")]
    batch = worker.my_batches(0, ALONE, 12)[0]
    assert torch.equal(*(engine.evaluate(batch) for engine in engines))
