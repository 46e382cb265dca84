"""How a run ends: a failure is told, and a save that can no longer end does not hold the process."""

from __future__ import annotations

import gc
import time
from pathlib import Path

import numpy as np
import pytest

from data_tools.indexed import IndexedWriter
from data_tools.manifest import Manifest, Shard, Split, TokenizerInfo
from mamba_pretrain import run
from mamba_pretrain.checkpoint.store import CheckpointStore
from mamba_pretrain.config import RunConfig
from mamba_pretrain.training.loop import Callback


class Fail(Callback):
    """Fails at step 3, while the checkpoint of step 2 is being saved."""

    def on_step(self, run, record):
        if record.step == 3:
            raise RuntimeError("a made-up failure")


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    data = tmp_path / "data"
    with IndexedWriter(data / "train/00000", np.uint16) as writer:
        writer.add(np.arange(2000, dtype=np.uint16) % 50, np.full(20, 100))
    shard = Shard("train/00000", 20, 2000, "uint16", "", "")
    Manifest(tokenizer=TokenizerInfo("none", "none", 50, None, None), splits={"train": Split([shard])}).save(data)
    tree = {
        "name": "failing",
        "run_dir": str(tmp_path / "run"),
        "model": {"mixer": "mamba1", "vocab_size": 50, "d_model": 8, "n_layer": 1},
        "data": {"sources": [{"path": str(data)}], "sequence_length": 32},
        "train": {"steps": 6, "global_batch_size": 1, "micro_batch_size": 1},
        "precision": {"compute": "fp32"},
        "checkpoint": {"every_steps": 2},
        "evaluation": {"at_end": False},
        "monitor": {"wandb": {"mode": "disabled"}},
    }
    return RunConfig.model_validate(tree)


@pytest.fixture
def failing(monkeypatch):
    build = run.Training._callbacks
    monkeypatch.setattr(run.Training, "_callbacks", lambda self, guard: [*build(self, guard), Fail()])


def test_a_failure_waits_for_the_save_under_way(config, failing):
    with pytest.raises(RuntimeError, match="a made-up failure"):
        run.run_training(config)
    assert (config.run_dir / "checkpoints" / "step-00000002" / "manifest.json").is_file()


def test_a_failure_leaves_the_process_as_it_was(config, failing):
    with pytest.raises(RuntimeError, match="a made-up failure"):
        run.run_training(config)
    assert gc.isenabled(), "the loop collects garbage at steps of its own"


def test_a_failure_does_not_wait_for_a_save_that_cannot_end(config, failing, monkeypatch, capsys):
    monkeypatch.setattr(run, "PATIENCE_AFTER_FAILURE", 0.5)

    def write(store, temporary, copy, step, description):
        copy.finish()  # what the next step waits for
        time.sleep(30)

    monkeypatch.setattr(CheckpointStore, "_write", write)
    began = time.monotonic()
    with pytest.raises(RuntimeError, match="a made-up failure"):
        run.run_training(config)
    assert time.monotonic() - began < 15
    assert "did not finish within 0.5 s; the one before stands" in capsys.readouterr().err


def test_a_run_that_succeeds_waits_to_the_end(config):
    assert run.run_training(config) == 0
    assert (config.run_dir / "checkpoints" / "step-00000006" / "manifest.json").is_file()
