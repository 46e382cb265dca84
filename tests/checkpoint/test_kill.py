"""SIGKILL at random instants while checkpoints are written; ``benchmarks/kill_saves.py`` does it fifty times."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest


@pytest.fixture
def kill_saves(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    yield importlib.import_module("kill_saves")
    sys.modules.pop("kill_saves")


@pytest.mark.parametrize(("engine", "world", "kills"), [("single", 1, 2), ("fsdp2", 2, 3)])
def test_a_killed_run_keeps_its_losses(kill_saves, tmp_path, engine, world, kills):
    result = kill_saves.torture(engine, world, kills, tmp_path, seed=1)
    assert result["identical"]
    assert result["kills_during_a_save"] > 0
