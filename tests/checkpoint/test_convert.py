"""Weights written without an engine."""

from __future__ import annotations

import torch

from mamba_pretrain.checkpoint.convert import write_weights
from mamba_pretrain.checkpoint.reading import list_checkpoints, open_checkpoint
from mamba_pretrain.parallel.portable import check_moments


def test_written_weights_are_a_checkpoint_without_moments(tmp_path):
    weights = {"embedding.weight": torch.randn(5, 3), "norm_f.weight": torch.ones(3, dtype=torch.bfloat16)}
    write_weights(tmp_path, weights, {"source": "elsewhere"})
    checkpoint = open_checkpoint(tmp_path)
    assert all(torch.equal(checkpoint.full_model()[name], tensor.float()) for name, tensor in weights.items())
    assert (checkpoint.step, checkpoint.meta["source"]) == (0, "elsewhere")
    assert not check_moments(checkpoint.reader, {"norm_f.weight": ("exp_avg",)})


def test_writing_again_replaces(tmp_path):
    for value in (1.0, 2.0):
        write_weights(tmp_path, {"w": torch.full((4,), value)}, {})
    (tmp_path / "checkpoints" / ".tmp-step-00000000").mkdir()
    write_weights(tmp_path, {"w": torch.full((4,), 3.0)}, {})
    assert open_checkpoint(tmp_path).full_model()["w"].tolist() == [3.0] * 4
    assert [entry.complete for entry in list_checkpoints(tmp_path / "checkpoints")] == [True]
