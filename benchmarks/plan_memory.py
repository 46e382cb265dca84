"""Peak memory of real training steps on one GPU against what `mamba-pretrain plan` says.

    python benchmarks/plan_memory.py                # on the GPU machine: measures every point, recording after each
    python benchmarks/plan_memory.py --check        # reads the newest record; the plan is computed anew

Bar: the plan is within 10% of the measured peak at every point, and there are at least 8 points. Beside the peaks, one block of each model
is run alone and what each of its modules keeps for the backward pass is recorded: where a plan is off, that says by which module.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from record import RESULTS, Growing, newest, require_gpus
from weights import quick_initialization

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


def prepared(config: Any, recompute: str) -> Any:
    """The project's engine around a model with random weights."""
    import torch

    from mamba_pretrain.models.language_model import LanguageModel
    from mamba_pretrain.optim.build import optimizer_builder
    from mamba_pretrain.optim.config import OptimConfig
    from mamba_pretrain.parallel import topology
    from mamba_pretrain.parallel.build import build_engine
    from mamba_pretrain.parallel.config import ParallelConfig, PrecisionConfig

    with torch.device("meta"):
        model = LanguageModel(config)
    parallel = ParallelConfig(strategy="single", activation_checkpointing=recompute, cuda_graphs="off")  # a replay allocates nothing
    engine = build_engine(parallel, PrecisionConfig(compute="bf16"), topology.initialize(parallel))
    with quick_initialization():
        engine.prepare(model, optimizer_builder(OptimConfig(), model.parameter_policies()), seed=1)
    return engine


def random_batch(config: Any, micro_batch: int) -> Any:
    """One document per sequence."""
    import torch

    from mamba_pretrain.data.batch import Batch

    shape = (micro_batch, LENGTH)
    tokens = torch.randint(config.vocab_size, shape)
    positions = torch.arange(LENGTH).expand(shape).contiguous()
    return Batch(tokens, tokens, torch.zeros(shape, dtype=torch.int32), positions, tokens.numel(), torch.arange(micro_batch))


def measure(name: str, micro_batch: int, recompute: str) -> dict[str, Any]:
    """Peak bytes of live tensors over a few steps through the project's engine."""
    import torch

    from mamba_pretrain.training.step import train_step

    config = model_config(name)
    engine, batch = prepared(config, recompute), random_batch(config, micro_batch)
    for step in range(STEPS):
        if step == 1:
            torch.cuda.reset_peak_memory_stats()
        train_step(engine, [batch], 1e-5, 1.0)
    torch.cuda.synchronize()
    point = {"model": name, "micro_batch": micro_batch, "length": LENGTH, "checkpointing": recompute}
    return {**point, "peak": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}


def measure_block(name: str, micro_batch: int) -> dict[str, Any]:
    """One block alone: bytes saved for its backward pass, in all and by module, and the peaks of both passes beyond what was there before."""
    import torch

    from mamba_pretrain.models.block import Block
    from mamba_pretrain.models.boundaries import Boundaries

    config = model_config(name)
    block = Block(config, config.layer_mixers[0]).cuda()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.02)
    shape = (micro_batch, LENGTH)
    boundaries = Boundaries(torch.zeros(shape, dtype=torch.int32, device="cuda"), torch.arange(LENGTH, device="cuda").expand(shape))
    hidden = torch.zeros(*shape, config.d_model, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    residual = torch.zeros(*shape, config.d_model, device="cuda", requires_grad=True)

    def run() -> Any:
        with torch.autocast("cuda", torch.bfloat16):
            y, total = block(hidden * 1, residual * 1, boundaries)
        return y, total

    for _ in range(2):  # kernels are compiled and tuned, libraries take their workspaces
        y, total = run()
        (y.float().sum() + total.sum()).backward()
        del y, total
    block.zero_grad(set_to_none=True)
    hidden.grad = residual.grad = None
    modules, hooks = [], []
    for path, module in block.named_modules():
        if path:
            hooks.append(module.register_forward_pre_hook(lambda *_, path=path: modules.append((f"{path} begins", allocated()))))
            hooks.append(module.register_forward_hook(lambda *_, path=path: modules.append((f"{path} ends", allocated()))))
    torch.cuda.reset_peak_memory_stats()
    before = allocated()
    y, total = run()
    forward, saved = torch.cuda.max_memory_allocated() - before, allocated() - before - y.nbytes - total.nbytes
    torch.cuda.reset_peak_memory_stats()
    torch.autograd.backward((y, total), (torch.zeros_like(y), torch.zeros_like(total)))
    backward = torch.cuda.max_memory_allocated() - before - saved
    for hook in hooks:
        hook.remove()
    grown = [[where, at - before] for where, at in modules]
    return {"model": name, "micro_batch": micro_batch, "saved": saved, "forward": forward, "backward": backward, "after": grown}


def allocated() -> int:
    """Bytes of live tensors."""
    import torch

    return torch.cuda.memory_allocated()


def planned(point: dict[str, Any]) -> Any:
    """The plan of a measured point."""
    import torch

    from mamba_pretrain.models.language_model import LanguageModel
    from mamba_pretrain.planning import memory
    from mamba_pretrain.planning.activations import Options

    config = model_config(point["model"])
    with torch.device("meta"):
        shape = memory.Shape.of(LanguageModel(config))
    options = Options(torch.bfloat16, point["checkpointing"])
    return memory.estimate(config, shape, memory.sharding("single", 1), point["micro_batch"], point["length"], options=options)


def measure_all(names: list[str], seconds: float, save: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    """Every model without and with checkpointing, and one block of each; ``save`` is called after each.

    A point that runs out of memory is tried with half the micro-batch, once; after ``seconds`` no further one is begun.
    """
    import torch

    from mamba_pretrain.ops import registry

    began = time.monotonic()
    found: dict[str, Any] = {"points": [], "blocks": [], "out_of_memory": [], "left_out": []}
    jobs = [(name, "none", MODELS[name][1]) for name in names] + [(name, "block", MODELS[name][2]) for name in names]
    jobs += [(name, "alone", MODELS[name][1]) for name in names]
    for name, kind, micro_batch in jobs:
        if time.monotonic() - began > seconds:
            found["left_out"].append(f"{name} {kind}")
            continue
        for size in (micro_batch, micro_batch // 2):
            point = None
            try:
                point = measure_block(name, size) if kind == "alone" else measure(name, size, kind)
            except torch.cuda.OutOfMemoryError as error:
                found["out_of_memory"].append(f"{name} {kind} micro-batch {size}: {' '.join(str(error).split())[:160]}")
                print(found["out_of_memory"][-1], flush=True)
            release()  # behind the handler: inside it the exception still holds the frames, and they the tensors
            if point is not None:
                found["blocks" if kind == "alone" else "points"].append(point)
                print(f"{time.monotonic() - began:5.0f} s", {key: value for key, value in point.items() if key != "after"}, flush=True)
                break
        found["choices"] = [f"{choice.op}: {choice.name}" for choice in registry.choices()]
        save(found)
    return found


def release() -> None:
    """Frees what the last point left."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()


def check(found: dict[str, Any]) -> list[str]:
    """Prints measured and planned figures; returns which peaks are outside the bar."""
    points = found["points"]
    failed = [] if len(points) >= LEAST_POINTS else [f"{len(points)} points are fewer than {LEAST_POINTS}"]
    for point in points:
        plan = planned(point)
        off = plan.peak / point["peak"] - 1
        name = f"{point['model']:12} micro-batch {point['micro_batch']:3} checkpointing {point['checkpointing']:5}"
        print(f"{name}  measured {point['peak'] / 1e9:6.2f} GB  planned {plan.peak / 1e9:6.2f} GB  {off:+6.1%}  ({plan.moment})")
        if abs(off) > TOLERANCE:
            failed.append(f"{name.strip()}: {off:+.1%}")
    for block in found.get("blocks", []):
        cost = planned_block(block)
        pairs = ", ".join(
            f"{key} {block[key] / 1e6:,.0f} MB (planned {getattr(cost, key) / 1e6:,.0f})" for key in ("saved", "forward", "backward")
        )
        print(f"one block of {block['model']}, micro-batch {block['micro_batch']}: {pairs}")
    return failed


def planned_block(block: dict[str, Any]) -> Any:
    """The plan of a block that was measured alone."""
    from mamba_pretrain.planning.activations import Options, block_cost

    config = model_config(block["model"])
    return block_cost(config, config.layer_mixers[0], block["micro_batch"], LENGTH, Options())


def main() -> None:
    """Runs or checks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="read the newest record instead of measuring")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--seconds", type=float, default=200.0, help="begin no further point after so many")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if arguments.check:
        found = newest("plan_memory")
    else:
        require_gpus(parser)
        found = measure_all(arguments.models.split(","), arguments.seconds, Growing("plan_memory", arguments.output).save)
    failed = check(found)
    for line in failed:
        print(f"OUTSIDE THE BAR {line}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
