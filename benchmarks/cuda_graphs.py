"""A training step launched kernel by kernel against the same step replayed as CUDA graphs, in one run.

    python benchmarks/cuda_graphs.py [--models mamba1-370m,mamba2-130m] [--batch 16] [--accumulation 1]    # measures and records; needs a GPU
    python benchmarks/cuda_graphs.py --check                                                           # exit code 1 under a bar

Reported for each mode: time of a step (median), time the host needs to queue one while the device is idle, memory, and losses, which must be
equal. Weights are drawn on the GPU from one seed. Steps are queued without waiting in between, as in training.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
import train_step
from peers import Setting, ours
from record import RESULTS, conclude, newest, record, require_gpus

WARM_UP = 4  # steps: one is launched whatever the mode, one records
IDLE = 3  # steps that find the device idle
# Of losses, relative. Our kernels give the same bits; causal-conv1d's and mamba-ssm's add atomically, and two launched runs differ as much.
LARGEST_DIFFERENCE = 1e-3
MOST_HOST_SHARE = 0.25  # of a replayed step's time: the host must not be what a step waits for
SLOWEST = 1.02  # of a launched step's time: graphs may not lose by more than noise


def measure(name: str, mode: str, batch: int | None, length: int, steps: int, accumulation: int) -> dict[str, Any]:
    """One mode of one model: times in ms, memory in GB."""
    from mamba_pretrain.data.batch import Batch
    from mamba_pretrain.models.boundaries import Boundaries
    from mamba_pretrain.training.step import train_step as take_step

    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    config, default = train_step.config_of(name), train_step.MODELS[name][1]
    setting = Setting(name, config, (batch or default) * accumulation, length)
    torch.manual_seed(1)
    engine = ours(setting, cuda_graphs=mode).engine  # type: ignore[attr-defined]
    micros, losses, events, host = [], [], [], []
    for tokens in setting.tokens(WARM_UP + steps + IDLE):
        seq_idx = (torch.rand(tokens[:, 1:].shape) < 0.004).int().cumsum(1).int()
        inputs, labels = (t.cpu().contiguous() for t in (tokens[:, :-1], tokens[:, 1:]))
        positions = Boundaries.from_seq_idx(seq_idx).positions
        whole = Batch(inputs, labels, seq_idx, positions, labels.numel(), torch.arange(len(tokens)))
        size = len(tokens) // accumulation
        micros.append([whole.rows(slice(i, i + size)).pinned() for i in range(0, len(tokens), size)])
    for number, batches in enumerate(micros):
        if number == WARM_UP or number >= WARM_UP + steps:
            torch.cuda.synchronize()  # a host that is ahead waits for the device at some launch or other: that is not what it needs
        began = time.perf_counter()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        losses.append(take_step(engine, batches, setting.rate(number), 1.0).loss)
        end.record()
        events.append((start, end))
        host.append(time.perf_counter() - began)
    torch.cuda.synchronize()
    timed = events[WARM_UP : WARM_UP + steps]
    milliseconds = timed[0][0].elapsed_time(timed[-1][1]) / len(timed)
    return {
        "step_ms": milliseconds,
        "median_ms": statistics.median(a.elapsed_time(b) for a, b in timed),
        "host_ms": 1e3 * statistics.median(host[WARM_UP + steps :]),
        "tokens_per_second": setting.batch * length / milliseconds * 1e3,
        "allocated_gb": torch.cuda.max_memory_allocated() / 1e9,
        "reserved_gb": torch.cuda.max_memory_reserved() / 1e9,
        "failed": engine._graphs.failed if engine._graphs is not None else None,
        "replayed": engine._graphs is not None and bool(engine._graphs._recordings),
        "losses": [float(loss) for loss in losses],
    }


def check(result: dict[str, Any]) -> list[str]:
    """Prints the table; returns what is under its bar."""
    failed = []
    print(f"{'model':14}{'mode':>10}{'step ms':>10}{'host ms':>10}{'tokens/s':>12}{'reserved GB':>13}")
    for row in result["models"]:
        off, on = row["off"], row["on"]
        for mode, found in (("launched", off), ("replayed", on)):
            print(
                f"{row['model']:14}{mode:>10}{found['step_ms']:>10.1f}{found['host_ms']:>10.1f}{found['tokens_per_second']:>12,.0f}"
                f"{found['reserved_gb']:>13.1f}"
            )
        worst = max(abs(a - b) / abs(b) for a, b in zip(on["losses"], off["losses"], strict=True))
        print(
            f"  losses differ by at most {worst:.1e} over {len(on['losses'])} steps; replayed / launched: {on['step_ms'] / off['step_ms']:.3f}"
        )
        if not on["replayed"]:
            failed.append(f"{row['model']}: nothing was replayed: {on['failed']}")
            continue
        if worst > LARGEST_DIFFERENCE:
            failed.append(f"{row['model']}: losses differ by {worst:.1e}")
        if on["step_ms"] > SLOWEST * off["step_ms"]:
            failed.append(f"{row['model']}: a replayed step takes {on['step_ms'] / off['step_ms']:.2f} of a launched one's time")
        if on["host_ms"] > MOST_HOST_SHARE * on["step_ms"]:
            failed.append(f"{row['model']}: the host needs {on['host_ms']:.0f} ms of a step of {on['step_ms']:.0f} ms")
    return failed


def main() -> None:
    """Runs or checks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--models", default="mamba1-370m,mamba2-130m")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if arguments.check:
        result = newest("cuda_graphs")
    else:
        require_gpus(parser)
        rows = []
        for name in arguments.models.split(","):
            sizes = arguments.batch, arguments.length, arguments.steps, arguments.accumulation
            rows.append(
                {"model": name, "accumulation": arguments.accumulation} | {mode: measure(name, mode, *sizes) for mode in ("off", "on")}
            )
        result = json.loads(record("cuda_graphs", {"models": rows}, folder=arguments.output).read_text())
    conclude(check(result))


if __name__ == "__main__":
    main()
