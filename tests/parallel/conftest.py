"""Trains every engine on every tiny model once per session; the tests look at the results."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

ENGINES = ("ddp", "fsdp2", "hsdp", "zero1", "zero2", "zero3")
MODELS = ("mamba1", "mamba2", "hybrid")
SCALINGS = ("tensorwise", "rowwise", "blockwise")  # of FP8
SHARD_SIZE = {2: 2, 3: 3, 4: 2}  # hsdp's, by number of processes


@pytest.fixture(scope="session")
def worker():
    """``benchmarks/engine_worker.py`` as a module."""
    path = Path(__file__).parents[2] / "benchmarks" / "engine_worker.py"
    spec = importlib.util.spec_from_file_location("engine_worker", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["engine_worker"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def job(worker):
    """Makes a job for a number of processes."""

    def make(key, engine, world=1, **fields):
        parallel = fields.pop("parallel", {})
        if engine == "hsdp":
            parallel = {"hsdp_shard_size": SHARD_SIZE[world], **parallel}
        return worker.Job(key, engine, parallel=parallel, **{"micro": 2, **fields})

    return make


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """Where runs save: ``runs / "ENGINE-PROCESSES"``."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="session")
def single(worker, job, runs):
    """One plain process: the numbers that every engine must give."""
    saving = {"save": str(runs / "single-1"), "save_at": 3}
    jobs = [job(model, "single", model=model, steps=8, **(saving if model == "hybrid" else {})) for model in MODELS]
    jobs += [job(f"{model}-bf16", "single", model=model, steps=2, compute="bf16") for model in MODELS]
    jobs += [job(f"fp8-{fp8}", "single", model="aligned", steps=2, compute="bf16", fp8=fp8) for fp8 in ("off", *SCALINGS)]
    jobs += [job(f"accumulated-{n}", "single", model="hybrid", steps=4, micro=12 // n) for n in (1, 12)]
    jobs += [job("skip", "single", model="hybrid", steps=4, skip=[0, 2])]
    jobs += [job("muon", "single", model="hybrid", steps=6, optim={"name": "muon"}, save=str(runs / "muon-1"), save_at=3)]
    return worker.run_jobs(1, jobs, runs / "single")


@pytest.fixture(scope="session")
def two(worker, job, runs, single):
    """Every engine and model on two processes, in fp32 and in bf16, single settings on one model, and what ``single`` saved continued."""
    jobs = [job(f"{e}-{m}", e, 2, model=m, steps=8) for e in ENGINES for m in ("mamba1", "mamba2")]
    jobs += [job(f"{e}-hybrid", e, 2, model="hybrid", steps=8, save=str(runs / f"{e}-2"), save_at=3) for e in ENGINES]
    jobs += [job(f"{e}-{m}-bf16", e, 2, model=m, steps=2, compute="bf16") for e in ENGINES for m in MODELS]
    jobs += [job(f"{e}-{fp8}", e, 2, model="aligned", steps=2, compute="bf16", fp8=fp8) for e in ENGINES for fp8 in SCALINGS]
    jobs += [job(f"{e}-skip", e, 2, model="hybrid", steps=4, skip=[0, 2]) for e in ENGINES]
    for mode in ("block", "selective", "projections"):
        parallel = {"activation_checkpointing": mode}
        jobs += [job(f"{e}-{mode}", e, 2, model="hybrid", steps=2, parallel=parallel) for e in ("ddp", "fsdp2", "zero2", "zero3")]
    jobs += [job(f"{e}-offload", e, 2, model="hybrid", steps=3, parallel={"cpu_offload": True}) for e in ("fsdp2", "zero2", "zero3")]
    jobs += [job("fsdp2-kept", "fsdp2", 2, model="hybrid", steps=3, parallel={"reshard_after_forward": False})]
    jobs += [job("fsdp2-muon", "fsdp2", 2, model="hybrid", steps=6, first=3, optim={"name": "muon"}, load=str(runs / "muon-1"))]
    jobs += [job(f"{e}-from-single-1", e, 2, model="hybrid", steps=5, first=3, load=str(runs / "single-1")) for e in ENGINES]
    return worker.run_jobs(2, jobs, runs / "two")


@pytest.fixture(scope="session")
def three(worker, job, runs, two):
    """Shards of unequal size, some of them empty; ZeRO offloaded and skipping; and what two processes saved, continued under another engine."""
    jobs = [job(f"{e}-{m}", e, 3, model=m, steps=3) for e in ENGINES for m in ("mamba1", "hybrid")]
    jobs += [job(f"{e}-{m}-bf16", e, 3, model=m, steps=2, compute="bf16") for e in ENGINES for m in ("mamba1", "hybrid")]
    jobs += [job(f"{e}-skip", e, 3, model="hybrid", steps=4, skip=[0, 2]) for e in ("zero1", "zero2", "zero3")]
    jobs += [job(f"{e}-offload", e, 3, model="hybrid", steps=3, parallel={"cpu_offload": True}) for e in ("zero2", "zero3")]
    for target, source in zip(ENGINES, [*ENGINES[1:], ENGINES[0]], strict=True):
        jobs += [job(f"{target}-from-{source}-2", target, 3, model="hybrid", steps=5, first=3, load=str(runs / f"{source}-2"))]
    return worker.run_jobs(3, jobs, runs / "three")


@pytest.fixture(scope="session")
def four(worker, job, runs):
    """Four processes: hsdp is a 2 x 2 mesh, ZeRO++ hpZ has groups of 2."""
    jobs = [job(f"{e}-hybrid", e, 4, model="hybrid", steps=3) for e in ENGINES]
    jobs += [job("hpz-hybrid", "zero3", 4, model="hybrid", steps=3, parallel={"zero_hpz_partition_size": 2})]
    return worker.run_jobs(4, jobs, runs / "four")


@pytest.fixture(scope="session")
def single_continued(worker, job, runs, two):
    """What two processes saved under each engine, continued by one plain process."""
    jobs = [job(f"from-{e}-2", "single", model="hybrid", steps=5, first=3, load=str(runs / f"{e}-2")) for e in ENGINES]
    return worker.run_jobs(1, jobs, runs / "continued")
