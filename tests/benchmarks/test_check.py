"""The regression guard over benchmark records."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

check = pytest.importorskip("check")

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "check.py"


def write(folder: Path, date: str, rate: float, milliseconds: float, device: str = "H100") -> None:
    rows = [{"model": "b", "tokens_per_second": 10.0}, {"model": "a", "tokens_per_second": rate, "step_ms": milliseconds, "losses": [rate]}]
    body = {"name": "train_step", "device": device, "date": date, "comparisons": rows if rate > 100 else rows[::-1]}
    (folder / f"train_step-{device}-{date}.json").write_text(json.dumps(body))


def run(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), "--results", str(folder)], capture_output=True, text=True, check=False)


def test_slower_is_named_and_fails(tmp_path: Path) -> None:
    write(tmp_path, "2026-11-01", 200.0, 5.0)
    write(tmp_path, "2026-11-02", 100.0, 10.0)
    finished = run(tmp_path)
    assert finished.returncode == 1
    assert "comparisons[a].tokens_per_second: 200 -> 100 (-50.0%) from 2026-11-01 to 2026-11-02" in finished.stdout
    assert "comparisons[a].step_ms: 5 -> 10 (+100.0%)" in finished.stdout
    assert "3 figures, 2 worse" in finished.stdout


def test_faster_and_other_devices_pass(tmp_path: Path) -> None:
    write(tmp_path, "2026-11-01", 200.0, 5.0)
    write(tmp_path, "2026-11-02", 210.0, 5.1)
    write(tmp_path, "2026-11-03", 50.0, 50.0, device="A100")
    finished = run(tmp_path)
    assert finished.returncode == 0
    assert "0 worse" in finished.stdout


def worse(before: dict[str, Any], *after: dict[str, Any]) -> list[str]:
    records = [{"date": f"2026-11-{day:02}", **body} for day, body in enumerate((before, *after), 1)]
    return [line.split(":")[0] for line in check.compare(check.histories(records), 0.05)[0]]


def test_a_part_is_compared_with_the_last_run_that_has_it() -> None:
    def rows(**rates: float) -> dict[str, Any]:
        return {"comparisons": [{"model": model, "length": 2048, "ours": {"tokens_per_second": rate}} for model, rate in rates.items()]}

    assert worse(rows(a=10, b=10), rows(b=10), rows(a=9)) == ["comparisons[a/2048].ours.tokens_per_second"]


RECORDS = {
    "train_step": (
        {
            "comparisons": [
                {"model": "m", "length": 2048, "batch": 16, "ours": {"tokens_per_second": 10.0, "peak_gb": 9.0, "losses": [9.0]}}
            ]
        },
        {"best": [{"model": "m", "length": 2048, "ours": {"tokens_per_second": 12.0, "tried": {"32": 12.0}}}]},
    ),
    "cuda_graphs": ({"models": [{"model": "m", "accumulation": 1, "on": {"step_ms": 5.0, "reserved_gb": 9.0, "losses": [9.0]}}]},),
    "generation": ({"rows": [{"model": "m", "batch": 16, "ours": {"tokens_per_second": 10.0, "step_ms": 1.0, "equal_tokens": 0.5}}]},),
    "ssd_scan": ({"rows": [{"shape": "B8", "ours": {"forward_ms": 1.0, "samples_ms": [1.0]}, "speedup": {"forward": 2.0}}]},),
    "causal_conv1d": ({"rows": [{"shape": "B8", "ours": {"forward_ms": 1.0}, "errors": {"dx": 1e-3}}]},),
    "loader": ({"samples_per_second": {"reader": {"cold": 10.0}}},),
    "engine_gpus": ({"scaling": [{"model": "m", "engine": "fsdp2", "gpus": 2, "tokens_per_second_per_gpu": 10.0}]},),
}
EXPECTED = {
    "train_step": ["tokens_per_second", "peak_gb", "tokens_per_second"],
    "cuda_graphs": ["step_ms", "reserved_gb"],
    "generation": ["tokens_per_second", "step_ms"],
    "ssd_scan": ["forward_ms"],
    "causal_conv1d": ["forward_ms"],
    "loader": ["samples_per_second.reader.cold"],
    "engine_gpus": ["tokens_per_second_per_gpu"],
}


@pytest.mark.parametrize("name", RECORDS)
def test_figures_of_a_benchmark_that_are_compared(name: str) -> None:
    found = [path for body in RECORDS[name] for path in check.histories([{"date": "2026-11-01", **body}])]
    assert len(found) == len(EXPECTED[name])
    assert all(path.endswith(end) for path, end in zip(found, EXPECTED[name], strict=True))


def test_peers_and_floors_are_not_compared() -> None:
    row = {
        "model": "m",
        "mamba_ssm": {"step_ms": 1.0},
        "fla+fuse=x": {"step_ms": 1.0},
        "moved": {"floor_ms": 1.0},
        "floors": {"bytes_ms": 1.0},
    }
    body = {"rows": [row], "programs": [{"name": "megatron-gigatoken", "seconds": 1.0}], "transformers_tokens_per_second": 3.0}
    assert check.histories([{"date": "2026-11-01", **body}]) == {}
