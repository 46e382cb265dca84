"""Engines on GPUs: loss curves of the 370m models, speed, memory, and weak scaling of the 1.4b model.

    python benchmarks/engine_gpus.py --gpus 2                                  # everything: about 10 minutes on 2 H100
    python benchmarks/engine_gpus.py --gpus 2 --steps 40 --engines fsdp2 zero3 --models mamba2-370m --no-scaling
    python benchmarks/engine_gpus.py --check                                   # of every model and engine, and of scaling, the newest counts

Starts its own processes, one per GPU, and runs all jobs of a number of GPUs in one process group. Bars: loss curves of all engines within the
bf16 band of each other; weak scaling of FSDP2 from 1 to 2 GPUs at least 95%.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import statistics
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from engine_worker import start_processes
from record import RESULTS, Growing, conclude, every, require_gpus
from weights import quick_initialization

MODELS = {
    "mamba1-370m": {"mixer": "mamba1", "vocab_size": 50277, "d_model": 1024, "n_layer": 48},
    "mamba2-370m": {"mixer": "mamba2", "vocab_size": 50277, "d_model": 1024, "n_layer": 48},
    "mamba1-1.4b": {"mixer": "mamba1", "vocab_size": 50277, "d_model": 2048, "n_layer": 48},
}
COMPARED = ("mamba1-370m", "mamba2-370m")
ENGINES = ("ddp", "fsdp2", "zero2", "zero3")
LENGTH = 2048
# Gradients rounded to bf16 and summed in another order, and atomics in the official backward kernels, make curves drift apart slowly: 1% at most
# over 100 steps, compared on means of 10 steps so that single batches do not decide. The learning rate is one at which no engine's curve has
# spikes: at 1e-3, reached in 10 steps, each had one, of 2 to 4%, at a step of its own.
BAND = 0.01
PEAK, WARM_UP = 3e-4, 20
SCALING_BAR = 0.95


def batches(step: int, rank: int, world: int, rows: int, vocab: int) -> list[Any]:
    """This rank's batch of a step. Text-like: Zipf-distributed words, and copies of what came 64 tokens before, which a model can learn."""
    import torch

    from mamba_pretrain.data.batch import Batch

    generator = torch.Generator().manual_seed(step)
    shape = (rows * world, LENGTH + 1)
    words = (torch.rand(shape, generator=generator) ** 4 * vocab).long()
    copied = torch.rand(shape, generator=generator) < 0.5
    for start in range(64, LENGTH + 1, 64):
        span = slice(start, min(start + 64, LENGTH + 1))
        before = words[:, start - 64 : span.stop - 64]
        words[:, span] = torch.where(copied[:, span], before, words[:, span])
    mine = words[rank * rows : (rank + 1) * rows]
    positions = torch.arange(LENGTH).repeat(rows, 1)
    batch = Batch(
        mine[:, :-1].contiguous(), mine[:, 1:].contiguous(), torch.zeros(rows, LENGTH).int(), positions, rows * LENGTH, positions[:, 0]
    )
    return [batch.pinned()]


def run_job(job: dict[str, Any], topology: Any) -> dict[str, Any]:
    """Trains one model under one engine; losses, tokens per second and GPU, peak memory, kernels."""
    import gc

    import torch

    from mamba_pretrain.models.config import ModelConfig
    from mamba_pretrain.models.language_model import LanguageModel
    from mamba_pretrain.ops import registry
    from mamba_pretrain.optim.build import optimizer_builder
    from mamba_pretrain.optim.config import OptimConfig
    from mamba_pretrain.parallel.build import build_engine
    from mamba_pretrain.parallel.config import ParallelConfig, PrecisionConfig
    from mamba_pretrain.training.step import train_step

    config = ModelConfig(**MODELS[job["model"]])
    with torch.device("meta"):
        model = LanguageModel(config)
    engine = build_engine(ParallelConfig(strategy=job["engine"], **job.get("parallel", {})), PrecisionConfig(), topology)
    with quick_initialization() if job.get("speed_only") else contextlib.nullcontext():
        engine.prepare(model, optimizer_builder(OptimConfig(lr=PEAK), model.parameter_policies()), seed=1)
    engine.isolate_documents = False  # a sequence is one document here, so that every kernel can serve
    torch.cuda.reset_peak_memory_stats()
    losses, marks = [], []
    host = 0.0
    data = [batches(step, topology.rank, topology.world_size, job["rows"], config.vocab_size) for step in range(job["steps"])]
    # As in training no step waits for the one before; the device's own clock says how long each takes.
    for step, batch in enumerate(data):
        began = time.perf_counter()
        losses.append(train_step(engine, batch, PEAK * min(1.0, (step + 1) / WARM_UP), 1.0).loss)
        host = time.perf_counter() - began
        marks.append(torch.cuda.Event(enable_timing=True))
        marks[-1].record()
        if step == job["steps"] // 4:
            torch.cuda.synchronize()
    torch.cuda.synchronize()
    milliseconds = [earlier.elapsed_time(later) for earlier, later in itertools.pairwise(marks)][len(marks) // 4 + 1 :]
    graphs = getattr(engine, "_graphs", None)
    result = {
        "losses": [round(float(loss), 5) for loss in losses],
        "tokens_per_second_per_gpu": round(job["rows"] * LENGTH / statistics.median(milliseconds) * 1e3),
        "step_ms": round(statistics.median(milliseconds), 2),
        "last_host_ms": round(1e3 * host, 2),
        "replayed": graphs is not None and bool(graphs._recordings),
        "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2),
        "kernels": {choice.op: choice.name for choice in registry.choices()},
    }
    del engine, model, graphs
    gc.collect()
    torch.cuda.empty_cache()
    return result


def worker(folder: Path) -> None:
    """One process: runs ``folder/jobs.json``; rank 0 writes ``folder/results.json`` after every job."""
    from mamba_pretrain.parallel import topology as ranks
    from mamba_pretrain.parallel.config import ParallelConfig

    topology = ranks.initialize(ParallelConfig(timeout_minutes=5.0, strategy="zero1"))
    results = []
    for job in json.loads((folder / "jobs.json").read_text()):
        results.append(job | run_job(job, topology))
        if topology.rank == 0:
            print({key: value for key, value in results[-1].items() if key != "losses"}, flush=True)
            (folder / "results.json").write_text(json.dumps(results))
    ranks.shutdown()


def launch(gpus: int, jobs: list[dict[str, Any]], seconds: float, first: int = 0) -> list[dict[str, Any]]:
    """Runs jobs on ``gpus`` GPUs from number ``first`` on, ending them after ``seconds``; the results of those that finished. Prints rank 0's
    output if not all did."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "jobs.json").write_text(json.dumps(jobs))
        until = time.monotonic() + seconds
        visible = {"CUDA_VISIBLE_DEVICES": ",".join(str(first + i) for i in range(gpus))}
        processes = start_processes(gpus, [str(Path(__file__).resolve()), "--worker", name], folder, visible)
        while (
            time.monotonic() < until
            and any(process.poll() is None for process in processes)
            and not any(process.poll() for process in processes)
        ):
            time.sleep(0.5)
        for process in processes:
            process.kill()
        codes = [process.wait() for process in processes]
        results = json.loads((folder / "results.json").read_text()) if (folder / "results.json").exists() else []
        output = (folder / "rank-0.log").read_text()
        if any(codes) and len(results) < len(jobs):
            print(f"{gpus} GPUs: {len(results)} of {len(jobs)} jobs finished\n{output[-4000:]}", file=sys.stderr)
        return results


def band(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Per model that several engines trained, the largest relative distance between two of them, on means of 10 steps."""
    found = {}
    for model in {run["model"] for run in runs}:
        curves = [
            [statistics.fmean(run["losses"][i : i + 10]) for i in range(0, len(run["losses"]), 10)] for run in runs if run["model"] == model
        ]
        if len(curves) > 1:
            found[model] = max(abs(a - b) / b for one, other in itertools.permutations(curves, 2) for a, b in zip(one, other, strict=True))
    return found


def merged(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Of every model and engine the newest run, and the newest scaling, from records in order of time. A model's runs with one recipe are compared,
    of whichever launches they are; those with another recipe than the newest are left out."""
    found: dict[str, Any] = {"gpus": records[-1]["gpus"], "scaling": [], "weak_scaling": None}
    runs: dict[str, dict[str, Any]] = {}
    recipes: dict[str, Any] = {}
    for record in records:
        for run in record["runs"]:
            model, recipe = run["model"], (record.get("recipe"), run["gpus"])  # a batch has so many sequences a GPU
            if model not in runs or recipes[model] != recipe:
                runs[model], recipes[model] = {}, recipe
            runs[model][run["engine"]] = run
        if record["weak_scaling"] is not None:
            found |= {name: record[name] for name in ("scaling", "weak_scaling", "gpus")}
    found["runs"] = [run for of_model in runs.values() for run in of_model.values()]
    return found | {"band": band(found["runs"])}


def failures(payload: dict[str, Any]) -> list[str]:
    """Prints the figures; returns what is missing or under its bar."""
    for run in payload["runs"] + payload["scaling"]:
        speed = f"{run['tokens_per_second_per_gpu']:>8,} tokens/s/GPU  {run['peak_gb']:6.2f} GB"
        name = f"{run['engine']}{' replayed' if run.get('replayed') else ''}"
        print(f"{run['model']:12} {name:14} x{run['gpus']}  {speed}  loss {run['losses'][0]:.4f} -> {run['losses'][-1]:.4f}")
    failed = []
    done = {(run["model"], run["engine"]) for run in payload["runs"]}
    failed += [f"{model} under {engine}: not measured" for model in COMPARED for engine in ENGINES if (model, engine) not in done]
    for model, distance in sorted(payload["band"].items()):
        print(f"{model}: engines within {distance:.2%} of each other (bar {BAND:.0%})")
        if distance > BAND:
            failed.append(f"{model}: engines differ by {distance:.2%}, {BAND:.0%} allowed")
    scaling = payload["weak_scaling"]
    if scaling is not None:
        print(f"weak scaling of FSDP2, 1.4b, 1 to {payload['gpus']} GPUs: {scaling:.1%} (bar {SCALING_BAR:.0%})")
    if scaling is None or scaling < SCALING_BAR:
        failed.append(f"weak scaling of FSDP2: {'not measured' if scaling is None else f'{scaling:.1%}'}, {SCALING_BAR:.0%} wanted")
    return failed


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """All jobs; where there are GPUs enough, one model's beside another's. What is done is recorded as it comes."""
    import torch

    gpus, until = arguments.gpus, time.monotonic() + arguments.seconds
    places = max(1, torch.cuda.device_count() // gpus)
    large = {"model": "mamba1-1.4b", "steps": 16, "rows": arguments.large_rows, "speed_only": True}
    recipe = {"peak_rate": PEAK, "warm_up": WARM_UP, "steps": arguments.steps, "rows": arguments.rows}
    found: dict[str, Any] = {"gpus": gpus, "recipe": recipe, "runs": [], "scaling": [], "band": {}, "weak_scaling": None}
    growing, lock = Growing("engine_gpus", arguments.output), threading.Lock()

    def left() -> float:
        return max(0.0, until - time.monotonic())

    if arguments.scaling:
        # One process's fsdp2 has nothing to shard: the plain engine, the strictest base there is. Nothing runs beside these two.
        kept = {"reshard_after_forward": False}
        found["scaling"] += launch(gpus, [{**large, "engine": "fsdp2", "gpus": gpus, "parallel": kept}], left())
        found["scaling"] += launch(1, [{**large, "engine": "single", "gpus": 1}], left())
        if len(found["scaling"]) == 2:
            many, one = (run["tokens_per_second_per_gpu"] for run in found["scaling"])
            found["weak_scaling"] = many / one
        print("recorded", growing.save(found), flush=True)
    free = list(range(places))

    def run(model: str) -> None:
        place = free.pop()
        jobs = [{"engine": e, "model": model, "steps": arguments.steps, "rows": arguments.rows, "gpus": gpus} for e in arguments.engines]
        results = launch(gpus, jobs, left(), place * gpus)
        with lock:
            found["runs"] += results
            found["band"] = band(found["runs"])
            print("recorded", growing.save(found), flush=True)
        free.append(place)

    with ThreadPoolExecutor(places) as pool:
        list(pool.map(run, arguments.models))
    return found


def main() -> None:
    """Measures or reads, prints, records; exit code 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="read the records and exit 1 if a bar is missed")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rows", type=int, default=8, help="sequences of 2048 tokens per GPU and step, 370m")
    parser.add_argument("--large-rows", type=int, default=8, help="the same for 1.4b")
    parser.add_argument("--seconds", type=float, default=900.0, help="end after so many; what is done is recorded")
    parser.add_argument("--engines", nargs="+", default=list(ENGINES))
    parser.add_argument("--models", nargs="+", default=list(COMPARED), choices=sorted(MODELS))
    parser.add_argument(
        "--scaling", action=argparse.BooleanOptionalAction, default=True, help="also measure weak scaling of the 1.4b model"
    )
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.worker)
        return
    if not arguments.check:
        require_gpus(parser, arguments.gpus)
    payload = merged(every("engine_gpus")) if arguments.check else measure(arguments)
    conclude(failures(payload))


if __name__ == "__main__":
    main()
