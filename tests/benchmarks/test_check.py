"""The regression guard over benchmark records."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

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
    assert "comparisons[a].tokens_per_second: 200 -> 100 (-50.0%)" in finished.stdout
    assert "comparisons[a].step_ms: 5 -> 10 (+100.0%)" in finished.stdout
    assert "3 figures, 2 worse" in finished.stdout


def test_faster_and_other_devices_pass(tmp_path: Path) -> None:
    write(tmp_path, "2026-11-01", 200.0, 5.0)
    write(tmp_path, "2026-11-02", 210.0, 5.1)
    write(tmp_path, "2026-11-03", 50.0, 50.0, device="A100")
    finished = run(tmp_path)
    assert finished.returncode == 0
    assert "0 worse" in finished.stdout
