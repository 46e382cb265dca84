"""Trains Mamba-1 130m and Mamba-2 130m on real text through the command line on one GPU, and compares fused kernels with the reference.

    python benchmarks/gpu_training.py --data DATASET [--steps 300]     # on the GPU machine; DATASET is a folder of `mamba-data tokenize`
    python benchmarks/gpu_training.py --check                          # reads the newest record and checks it

Bars: the loss falls below 60% of its first value, data-wait is under 1% of the step time, and the reference implementations' losses over
20 steps agree with those of the fused kernels to 1e-3 relative.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from record import RESULTS, Growing, conclude, newest

REPOSITORY = Path(__file__).parents[1]
MODELS = {"mamba1-130m": "configs/mamba1/130m.yaml", "mamba2-130m": "configs/mamba2/130m.yaml"}


def train(name: str, run_dir: Path, overrides: list[str]) -> list[dict[str, Any]]:
    """Runs ``mamba-pretrain train`` on one GPU and returns the rows of its metrics."""
    command = [sys.executable, "-m", "mamba_pretrain", "train", str(REPOSITORY / MODELS[name]), f"run_dir={run_dir}", *overrides]
    subprocess.run(command, check=True, cwd=REPOSITORY)
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def common(data: Path, steps: int, batch: int, isolate: bool) -> list[str]:
    """Overrides shared by all runs here. mamba_ssm's Mamba-1 kernels need ``isolate`` off."""
    overrides = [f"data.sources=[{{path: {data}}}]", f"train.steps={steps}", "train.tokens=null", "monitor.log_every=1"]
    overrides += ["monitor.wandb.mode=disabled", "checkpoint.every_steps=null", "evaluation.every_steps=null", "evaluation.at_end=true"]
    overrides.append(f"data.isolate_documents={str(isolate).lower()}")
    return [*overrides, f"train.global_batch_size={batch}", "train.global_batch_tokens=null", "evaluation.max_samples=64"]


def loss_curve(name: str, data: Path, steps: int, batch: int, scratch: Path, isolate: bool) -> dict[str, Any]:
    """A model's training with the fused kernels: losses and speed."""
    overrides = [*common(data, steps, batch, isolate), "train.micro_batch_size=16", "optim.lr=1.5e-3"]
    rows = train(name, scratch / name, overrides)
    steady = [row for row in rows if row["kind"] == "train"]
    tail = steady[len(steady) // 5 :]
    return {
        "batch": batch,
        "loss": [round(row["loss"], 5) for row in steady],
        "validation": [row["loss"] for row in rows if row["kind"] == "eval"],
        "tokens_per_second": statistics.median(row["tokens_per_second"] for row in tail),
        "mfu": statistics.median(row["mfu"] for row in tail),
        "mfu_6n": statistics.median(row["mfu_6n"] for row in tail),
        "memory_gb": max(row["memory_gb"] for row in steady),
        "data_wait_share": statistics.median(row["data_wait"] / row["step_time"] for row in tail),
    }


def agreement(name: str, data: Path, scratch: Path, isolate: bool, pool: ThreadPoolExecutor) -> dict[str, Any]:
    """20 steps with the reference implementations against 20 with what the resolver picks; bf16, same seed, same data.

    Within the warm-up, as the first 20 steps of a real run are: at the full rate from the second step on, training is not stable, and what
    rounding does to the losses grows tenfold in two steps, whichever implementation rounds.
    """
    shared = [
        *common(data, 20, 8, isolate),
        "train.micro_batch_size=4",
        "evaluation.at_end=false",
        "data.sequence_length=1024",
        "optim.lr=6e-4",
        "optim.schedule.warmup_steps=20",
    ]
    runs = {
        kind: pool.submit(train, name, scratch / f"{name}-{kind}", shared + extra)
        for kind, extra in {"fused": [], "reference": ["ops.require=reference"]}.items()
    }
    curves = {kind: [row["loss"] for row in run.result() if row["kind"] == "train"] for kind, run in runs.items()}
    worst = max(abs(a - b) / b for a, b in zip(curves["fused"], curves["reference"], strict=True))
    return {**curves, "largest_relative_difference": worst}


def check(result: dict[str, Any]) -> list[str]:
    """Prints the figures; returns what is under its bar."""
    failed = []
    for name, run in result["training"].items():
        speed = f"{run['tokens_per_second']:,.0f} tokens/s, MFU {run['mfu']:.1%} (6N {run['mfu_6n']:.1%}), {run['memory_gb']:.1f} GB"
        wait = run["data_wait_share"]
        print(
            f"{name}: loss {run['loss'][0]:.3f} -> {run['loss'][-1]:.3f}, {speed}, data wait {'not recorded' if wait is None else f'{wait:.2%}'}"
        )
        if not run["loss"][-1] < 0.6 * run["loss"][0]:
            failed.append(f"{name}: the loss did not fall below 60% of its first value")
        if wait is None or wait >= 0.01:
            failed.append(f"{name}: data wait is {'not recorded' if wait is None else f'{wait:.2%}'}, and not known to be under 1%")
    failed += [f"{name}: was not trained" for name in MODELS if name not in result["training"]]
    failed += [f"{name}: reference and fused losses were not compared" for name in MODELS if name not in result["agreement"]]
    for name, pair in result["agreement"].items():
        worst = pair["largest_relative_difference"]
        print(f"{name}: reference and fused losses differ by at most {worst:.1e} relative over {len(pair['fused'])} steps")
        if worst > 1e-3:
            failed.append(f"{name}: reference and fused losses differ by {worst:.1e}")
    return failed


def main() -> None:
    """Runs or checks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--complete", action="store_true", help="measure only what the newest record lacks")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=32, help="sequences of 2048 tokens a step, in micro-batches of 16")
    parser.add_argument("--share-state", action="store_true", help="let documents share state: what mamba_ssm's Mamba-1 kernels need")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if arguments.check:
        result = newest("gpu_training")
    else:
        if arguments.data is None:
            parser.error("--data DATASET is needed to run; --check reads the newest record")
        import torch  # noqa: F401  (the record names the device that it sees)

        data, isolate = arguments.data.resolve(), not arguments.share_state
        result = {"isolate_documents": isolate, "training": {}, "agreement": {}}
        if arguments.complete:
            result |= {part: newest("gpu_training")[part] for part in ("training", "agreement")}
        growing = Growing("gpu_training", arguments.output)
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            with ThreadPoolExecutor(max_workers=3 * len(MODELS)) as pool:  # nothing of this is timed: all at once
                missing = [name for name in MODELS if name not in result["agreement"]]
                found = {name: pool.submit(agreement, name, data, folder, isolate, pool) for name in missing}
                result["agreement"] |= {name: pair.result() for name, pair in found.items()}
            growing.save(result)
            for name in [name for name in MODELS if name not in result["training"]]:
                result["training"][name] = loss_curve(name, data, arguments.steps, arguments.batch, folder, isolate)
                growing.save(result)
    conclude(check(result))


if __name__ == "__main__":
    main()
