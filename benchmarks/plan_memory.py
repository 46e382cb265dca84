"""Peak memory of real training steps on one GPU against what `mamba-pretrain plan` says.

    python benchmarks/plan_memory.py                # on the GPU machine: measures every point and records
    python benchmarks/plan_memory.py --check        # reads the newest record; the plan is computed anew

Bar: the plan is within 10% of the measured peak at every point, and there are at least 8 points.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from record import RESULTS, newest, record

TOLERANCE, LEAST_POINTS = 0.10, 8
LENGTH = 2048
STEPS = 3  # the first has no optimizer state yet
# config, micro-batch without and with activation checkpointing
MODELS = {
    "mamba1-130m": ("configs/mamba1/130m.yaml", 16, 32),
    "mamba1-370m": ("configs/mamba1/370m.yaml", 8, 32),
    "mamba1-1.4b": ("configs/mamba1/1.4b.yaml", 4, 16),
    "mamba2-130m": ("configs/mamba2/130m.yaml", 16, 32),
    "mamba2-370m": ("configs/mamba2/370m.yaml", 8, 32),
    "mamba2-1.3b": ("configs/mamba2/1.3b.yaml", 4, 16),
}


def model_config(name: str) -> Any:
    """The model of a shipped config."""
    from mamba_pretrain.config import load_config

    return load_config(Path(__file__).parents[1] / MODELS[name][0]).model


def measure(name: str, micro_batch: int, recompute: str) -> dict[str, Any]:
    """Peak bytes of live tensors over a few steps through the project's engine."""
    import torch

    from mamba_pretrain.data.batch import Batch
    from mamba_pretrain.models.language_model import LanguageModel
    from mamba_pretrain.optim.build import optimizer_builder
    from mamba_pretrain.optim.config import OptimConfig
    from mamba_pretrain.parallel import topology
    from mamba_pretrain.parallel.config import ParallelConfig, PrecisionConfig
    from mamba_pretrain.parallel.engine import build_engine
    from mamba_pretrain.training.step import train_step

    config = model_config(name)
    with torch.device("meta"):
        model = LanguageModel(config)
    parallel = ParallelConfig(strategy="single", activation_checkpointing=recompute)
    engine = build_engine(parallel, PrecisionConfig(compute="bf16"), topology.initialize(parallel))
    engine.prepare(model, optimizer_builder(OptimConfig(), model.parameter_policies()), seed=1)
    shape = (micro_batch, LENGTH)
    tokens = torch.randint(config.vocab_size, shape)
    positions = torch.arange(LENGTH).expand(shape).contiguous()
    batch = Batch(tokens, tokens, torch.zeros(shape, dtype=torch.int32), positions, tokens.numel(), torch.arange(micro_batch))
    for step in range(STEPS):
        if step == 1:
            torch.cuda.reset_peak_memory_stats()
        train_step(engine, [batch], 1e-5, 1.0)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    del engine, model, batch
    gc.collect()
    torch.cuda.empty_cache()
    return {"model": name, "micro_batch": micro_batch, "length": LENGTH, "checkpointing": recompute, "peak": peak}


def planned(point: dict[str, Any]) -> Any:
    """The plan of a measured point."""
    import torch

    from mamba_pretrain.models.language_model import LanguageModel
    from mamba_pretrain.monitor.planning import memory
    from mamba_pretrain.monitor.planning.activations import Options

    config = model_config(point["model"])
    with torch.device("meta"):
        shape = memory.Shape.of(LanguageModel(config))
    options = Options(torch.bfloat16, point["checkpointing"])
    return memory.estimate(config, shape, memory.sharding("single", 1), point["micro_batch"], point["length"], options=options)


def measure_all(names: list[str]) -> list[dict[str, Any]]:
    """Every model with and without checkpointing; a point that runs out of memory is left out and said."""
    import torch

    from mamba_pretrain.ops import registry

    points = []
    for name in names:
        for recompute, micro_batch in zip(("none", "block"), MODELS[name][1:], strict=True):
            try:
                points.append(measure(name, micro_batch, recompute))
            except torch.cuda.OutOfMemoryError as error:
                print(f"{name} micro-batch {micro_batch} checkpointing {recompute}: {error}", flush=True)
                gc.collect()
                torch.cuda.empty_cache()
                continue
            print(points[-1], flush=True)
    print(*(f"{choice.op}: {choice.name}" for choice in registry.choices()), sep="\n")
    return points


def check(points: list[dict[str, Any]]) -> list[str]:
    """Prints measured and planned peaks; returns what is outside the bar."""
    failed = [] if len(points) >= LEAST_POINTS else [f"{len(points)} points are fewer than {LEAST_POINTS}"]
    for point in points:
        plan = planned(point)
        off = plan.peak / point["peak"] - 1
        name = f"{point['model']:12} micro-batch {point['micro_batch']:3} checkpointing {point['checkpointing']:5}"
        print(f"{name}  measured {point['peak'] / 1e9:6.2f} GB  planned {plan.peak / 1e9:6.2f} GB  {off:+6.1%}  ({plan.moment})")
        if abs(off) > TOLERANCE:
            failed.append(f"{name.strip()}: {off:+.1%}")
    return failed


def main() -> None:
    """Runs or checks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="read the newest record instead of measuring")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if arguments.check:
        points = newest("plan_memory")["points"]
    else:
        import torch

        if not torch.cuda.is_available():
            parser.error("this machine has no GPU; --check reads the newest record")
        points = measure_all(arguments.models.split(","))
        points = json.loads(record("plan_memory", {"points": points}, folder=arguments.output).read_text())["points"]
    failed = check(points)
    for line in failed:
        print(f"OUTSIDE THE BAR {line}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
