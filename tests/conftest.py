"""Fixtures and scheduling shared by all tests."""

from __future__ import annotations

import os

import pytest

# Tests run several small processes on few cores; more threads only fight each other. Set before torch is imported anywhere.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keeps a file's tests on one worker (they share fixtures) and all Slurm tests on one (they share a cluster); skips GPU tests."""
    for item in items:
        group = "slurm" if item.get_closest_marker("slurm") else str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if gpu_items:
        import torch

        if not torch.cuda.is_available():
            for item in gpu_items:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
