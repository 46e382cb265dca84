"""Sharded and replicated training replayed from CUDA graphs, collectives included, gives what it gives launched kernel by kernel: on two GPUs."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.gpu

CASES = {
    "ddp": ("ddp", {}),
    "fsdp2": ("fsdp2", {}),
    "fsdp2-kept": ("fsdp2", {"reshard_after_forward": False}),
    "fsdp2-bf16-sums": ("fsdp2", {"reduce_dtype": "bf16"}),
    "fsdp2-selective": ("fsdp2", {"activation_checkpointing": "selective"}),
    "hsdp": ("hsdp", {"hsdp_shard_size": 2}),
}


@pytest.fixture(scope="module")
def trained(worker, tmp_path_factory):
    """Results of every case, launched and replayed: six steps of two micro-batches, one of them skipped, a save on the way."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    folder = tmp_path_factory.mktemp("graphs")
    jobs = [
        worker.Job(
            f"{name}-{graphs}",
            engine,
            "mamba1",
            "bf16",
            steps=6,
            micro=3,
            skip=[2],
            save=str(folder / f"{name}-{graphs}"),
            save_at=4,
            parallel={**parallel, "cuda_graphs": graphs},
        )
        for name, (engine, parallel) in CASES.items()
        for graphs in ("on", "off")
    ]
    return worker.run_jobs(2, jobs, folder / "jobs")


@pytest.mark.parametrize("name", CASES)
def test_replayed_steps_equal_launched_ones(trained, name):
    replayed, launched = trained[f"{name}-on"], trained[f"{name}-off"]
    assert (replayed["recorded"], launched["recorded"]) == (2, 0), "one recording overwrites gradients, one adds to them"
    # Launched, only a step's last micro-batch sums over processes: the same sums in another order (bf16 sums are rounded once more).
    tolerance = 2e-2 if name == "fsdp2-bf16-sums" else 1e-4
    assert replayed["losses"] == pytest.approx(launched["losses"], rel=tolerance)
    assert replayed["norms"] == pytest.approx(launched["norms"], rel=10 * tolerance)
    assert replayed["skipped"] == [False, False, True, False, False, False]
    assert replayed["evaluated"] == pytest.approx(launched["evaluated"], rel=tolerance)
