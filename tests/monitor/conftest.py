"""A synthetic run folder that looks like a real one: falling loss, a restart, evaluations, samples, checkpoints."""

from __future__ import annotations

import json
import math
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent))  # tests are no packages: helpers of this folder are imported by name
from browser import Browser

BATCH_TOKENS = 524_288


def training_rows(steps: int, seed: int, lr: float, resume_at: int) -> list[dict[str, Any]]:
    """Rows in file order, with an evaluation at every tenth of the run."""
    random_state = random.Random(seed)
    began = 1_790_000_000.0
    rows: list[dict[str, Any]] = [{"kind": "event", "step": 0, "time": began, "event": "start", "world_size": 8}]
    for step in range(1, steps + 1):
        restart = int(step > resume_at)
        now = began + 3.2 * step + 5000 * restart
        if step == resume_at + 1:
            rows.append({"kind": "event", "step": resume_at, "time": now - 5, "event": "resume", "restart": 1})
        progress = step / steps
        clean = 2.45 + 7.6 * math.exp(-step / 90) + 1.1 * math.exp(-2.5 * progress) + seed * 0.04
        row: dict[str, Any] = {"kind": "train", "step": step, "tokens": step * BATCH_TOKENS, "time": now, "restart": restart}
        row["loss"] = clean + random_state.gauss(0, 0.035)
        row["lr"] = lr * min(1.0, step / (0.1 * steps)) * (0.5 + 0.5 * math.cos(math.pi * max(0.0, (progress - 0.1) / 0.9)))
        row["grad_norm"] = 0.25 + 3 * math.exp(-step / 60) + abs(random_state.gauss(0, 0.05)) + (4.0 if step == steps * 6 // 10 else 0.0)
        speed = 1_290_000 * (1 - 0.03 * random_state.random()) * (0.82 if step % 97 == 0 else 1.0)
        row |= {"tokens_per_second": speed, "step_time": BATCH_TOKENS / speed, "data_wait": 0.002 + 0.01 * random_state.random()}
        row |= {"mfu": speed * 9.7e8 / (8 * 989.4e12), "mfu_6n": speed * 7.7e8 / (8 * 989.4e12), "memory_gb": 27.6}
        rows.append(row)
        if step % max(1, steps // 10) == 0:
            for i, name in enumerate(("pile", "code")):
                loss = clean + 0.03 - 0.5 * i
                row = {"kind": "eval", "step": step, "tokens": step * BATCH_TOKENS, "time": now, "name": name, "loss": loss}
                rows.append(row | {"perplexity": math.exp(loss), "bits_per_byte": loss / math.log(2) / 4.2})
            text = "a time there was a model that learned to <b>read</b> & write </script> in linear time."
            rows.append({"kind": "sample", "step": step, "time": now, "prompt": "Once upon ", "text": text})
            stats = {key: [scale * (1 + 0.1 * layer) * (1 + progress) for layer in range(24)] for key, scale in STATS.items()}
            rows.append({"kind": "layers", "step": step, "tokens": step * BATCH_TOKENS, "time": now, "stats": stats})
            rows.append({"kind": "event", "step": step, "time": now + 1, "event": "save", "seconds": 4.2})
    rows.append({"kind": "event", "step": steps, "time": now + 2, "event": "stop", "reason": "finished"})
    return rows


STATS = {"activation_rms": 0.8, "gradient_rms": 0.02, "dt_mean": 0.01, "A_mean": 4.0, "B_norm": 2.0, "C_norm": 3.0}


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """``make_run(name, steps=400, seed=0, lr=3e-3)`` writes a run folder and returns its path."""

    def make(name: str, steps: int = 400, seed: int = 0, lr: float = 3e-3) -> Path:
        folder = tmp_path / name
        data = tmp_path / "data" / "pile"
        data.mkdir(parents=True, exist_ok=True)
        (data / "manifest.json").write_text(json.dumps({"splits": {"train": {"shards": [{"tokens": 10**9}]}}}))
        for step in (steps // 2, steps):
            checkpoint = folder / "checkpoints" / f"step-{step:08d}"
            checkpoint.mkdir(parents=True)
            (checkpoint / "manifest.json").write_text("{}")
            (checkpoint / "rank-00000.safetensors").write_bytes(b"0" * 1000)
        (folder / "checkpoints" / "latest").write_text(f"step-{steps:08d}\n")
        config = {
            "name": name,
            "model": {"mixer": "mamba2", "d_model": 768, "n_layer": 24},
            "optim": {"lr": lr, "betas": [0.9, 0.95]},
            "data": {"sources": [{"name": "pile", "path": str(data), "weight": 0.8}, {"name": "code", "path": "data/code", "weight": 0.2}]},
        }
        (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        rows = training_rows(steps, seed, lr, resume_at=steps // 2 - steps // 20)
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return folder

    return make


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Headless Chromium; the system packages of ``make system-packages`` bring it."""
    executable = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if executable is None:
        pytest.skip("no Chromium on this machine (make system-packages installs it)")
    with Browser(executable) as page:
        yield page
