"""The record of engines on GPUs: what is compared with what."""

from __future__ import annotations

import pytest
from engine_gpus import BAND, band, failures, merged


def run(model: str, engine: str, losses: list[float]) -> dict:
    return {"model": model, "engine": engine, "gpus": 2, "losses": losses, "tokens_per_second_per_gpu": 10, "peak_gb": 1.0}


def record(runs: list[dict], weak_scaling: float | None = None, rate: float = 3e-4) -> dict:
    return {"gpus": 2, "recipe": {"peak_rate": rate}, "runs": runs, "scaling": [], "band": band(runs), "weak_scaling": weak_scaling}


def curves(model: str, loss: float) -> list[dict]:
    return [run(model, engine, [loss] * 20) for engine in ("ddp", "fsdp2", "zero2", "zero3")]


def test_curves_of_one_recipe_are_compared():
    first = record(curves("mamba1-370m", 9.0) + curves("mamba2-370m", 5.0), weak_scaling=0.97, rate=1e-3)
    later, last = record(curves("mamba2-370m", 7.0)[:3]), record(curves("mamba2-370m", 7.0)[3:])
    found = merged([first, later, last])
    assert [run["losses"][0] for run in found["runs"]] == [9.0] * 4 + [7.0] * 4
    assert found["band"] == {"mamba1-370m": 0.0, "mamba2-370m": 0.0}
    assert failures(found) == []


def test_the_newest_run_of_an_engine_counts():
    found = merged([record(curves("mamba1-370m", 9.0)), record([run("mamba1-370m", "zero3", [10.0] * 20)])])
    assert found["band"]["mamba1-370m"] == pytest.approx(1 / 9)


def test_what_is_missing_or_too_far_apart_is_named():
    apart = curves("mamba1-370m", 9.0)
    apart[1]["losses"][10:] = [9.0 * (1 + 2 * BAND)] * 10
    failed = failures(merged([record(apart)]))
    assert failed[0] == "mamba2-370m under ddp: not measured"
    assert any("mamba1-370m: engines differ by 2.00%" in line for line in failed)
    assert failed[-1].startswith("weak scaling of FSDP2: not measured")


def test_the_newest_scaling_counts():
    records = [record([], 0.90), record([], 0.96), record([], None)]
    assert merged(records)["weak_scaling"] == pytest.approx(0.96)
