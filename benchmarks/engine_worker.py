"""Trains tiny models under any engine in processes of its own: what ``engine_matrix.py`` and the engine tests are made of.

``run_jobs(world_size, jobs, folder)`` starts the processes; as a script this file is one of them. A process group runs a whole list of jobs, since
starting a process costs more than training a tiny model. Batches are a pure function of the step, so every job sees the same global data.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from mamba_pretrain.data.batch import Batch
    from mamba_pretrain.models.language_model import LanguageModel
    from mamba_pretrain.parallel.engine import Engine
    from mamba_pretrain.parallel.topology import Topology

# Widths are such that 3 and 4 processes get uneven and empty shards (4 heads over 3 processes; 8 query channels over 4).
TINY: dict[str, dict[str, Any]] = {
    "mamba1": {"mixer": "mamba1", "vocab_size": 301, "d_model": 24, "n_layer": 2, "d_state": 8},
    "mamba2": {"mixer": "mamba2", "vocab_size": 301, "d_model": 24, "n_layer": 2, "d_state": 8, "headdim": 12, "chunk_size": 16},
    "hybrid": {
        "pattern": "mamba2, attention",
        "vocab_size": 301,
        "d_model": 24,
        "n_layer": 2,
        "d_state": 8,
        "headdim": 12,
        "chunk_size": 16,
        "n_head": 2,
        "d_intermediate": 40,
        "tie_word_embeddings": False,
    },
    # All widths of projections are multiples of 16, as FP8 needs them.
    "aligned": {
        "pattern": "mamba1, mamba2, attention",
        "vocab_size": 301,
        "d_model": 32,
        "n_layer": 3,
        "d_state": 8,
        "headdim": 4,
        "chunk_size": 16,
        "n_head": 2,
        "d_intermediate": 48,
    },
}
GLOBAL_BATCH, LENGTH = 12, 32  # 12 sequences divide among 1, 2, 3 and 4 processes


@dataclass
class Job:
    """One training. ``load`` and ``save`` are run folders; ``first`` is the step to begin with (the step of the checkpoint)."""

    key: str
    engine: str
    model: str = "mamba1"
    compute: str = "fp32"
    fp8: str = "off"
    steps: int = 20
    first: int = 0
    micro: int = 1
    load: str | None = None
    save: str | None = None
    save_at: int | None = None
    skip: list[int] = field(default_factory=list)
    parallel: dict[str, Any] = field(default_factory=dict)
    optim: dict[str, Any] = field(default_factory=dict)


# -- the starting side ----------------------------------------------------------------------------------------------------------------------


def run_jobs(world_size: int, jobs: list[Job], folder: Path, timeout: float = 600.0) -> dict[str, dict[str, Any]]:
    """Runs the jobs in ``world_size`` processes and returns the results by key. Raises RuntimeError with the processes' output if one fails."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").unlink(missing_ok=True)
    (folder / "jobs.json").write_text(json.dumps([asdict(job) for job in jobs]))
    processes = start_processes(world_size, [str(Path(__file__).resolve()), str(folder)], folder)
    deadline = time.monotonic() + timeout
    try:
        while any(process.poll() is None for process in processes):
            if time.monotonic() > deadline or any(process.poll() for process in processes):
                break
            time.sleep(0.05)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    results = json.loads((folder / "results.json").read_text()) if (folder / "results.json").exists() else {}
    if missing := [job.key for job in jobs if job.key not in results]:
        logs = "\n".join(f"--- {log.name}\n{log.read_text()[-3000:]}" for log in sorted(folder.glob("rank-*.log")))
        raise RuntimeError(f"{world_size} processes did not finish {missing[0]} and {len(missing) - 1} more\n{logs}")
    return results


def start_processes(
    world_size: int, command: list[str], folder: Path, environment: dict[str, str] | None = None
) -> list[subprocess.Popen[bytes]]:
    """Starts ``python COMMAND`` once per rank with torchrun's variables (and others), output in ``folder/rank-R.log``."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(world_size):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size, "MASTER_PORT": port}
        variables = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "MASTER_ADDR": "127.0.0.1",
            **{k: str(v) for k, v in place.items()},
            **(environment or {}),
        }
        with (folder / f"rank-{rank}.log").open("wb") as log:
            processes.append(subprocess.Popen([sys.executable, *command], env=variables, stdout=log, stderr=subprocess.STDOUT))
    return processes


# -- the running side -----------------------------------------------------------------------------------------------------------------------


def global_batch(step: int, vocab: int = 301) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, labels and seq_idx (12, 32) of a step: learnable (each token follows from the last), unevenly masked, with documents."""
    import torch

    generator = torch.Generator().manual_seed(1000 + step)
    start = torch.randint(vocab, (GLOBAL_BATCH, 1), generator=generator)
    tokens = (start + 7 * torch.arange(LENGTH + 1)) % vocab
    noise = torch.randint(vocab, tokens.shape, generator=generator)
    tokens = torch.where(torch.rand(tokens.shape, generator=generator) < 0.1, noise, tokens)
    labels = tokens[:, 1:].clone()
    masked = torch.arange(GLOBAL_BATCH)[:, None] * 2 > torch.arange(LENGTH)[None]  # the first sequence keeps all, the last loses 23
    labels[masked] = -100
    seq_idx = (torch.rand((GLOBAL_BATCH, LENGTH), generator=generator) < 0.08).int().cumsum(1).int()
    return tokens[:, :-1].contiguous(), labels, seq_idx


def my_batches(step: int, topology: Topology, micro: int) -> list[Batch]:
    """This rank's micro-batches of a step."""
    import torch

    from mamba_pretrain.data.batch import Batch
    from mamba_pretrain.models.boundaries import Boundaries

    share = GLOBAL_BATCH // topology.world_size
    mine = slice(topology.rank * share, (topology.rank + 1) * share)
    batches = []
    for tokens, labels, seq_idx in zip(*(t[mine].split(micro) for t in global_batch(step)), strict=True):
        positions = Boundaries.from_seq_idx(seq_idx).positions
        batches.append(Batch(tokens, labels, seq_idx, positions, int((labels != -100).sum()), torch.arange(len(tokens))))
    return batches


def build(job: Job, topology: Topology) -> tuple[Engine, LanguageModel, set[str]]:
    """The prepared engine of a job, its model, and the names of the parameters that must be used in fp32."""
    import torch

    from mamba_pretrain.models.config import ModelConfig
    from mamba_pretrain.models.language_model import LanguageModel
    from mamba_pretrain.optim.build import optimizer_builder
    from mamba_pretrain.optim.config import OptimConfig
    from mamba_pretrain.parallel.build import build_engine
    from mamba_pretrain.parallel.config import ParallelConfig, PrecisionConfig

    with torch.device("meta"):
        model = LanguageModel(ModelConfig(**TINY[job.model]))
    policies = model.parameter_policies()
    parallel = ParallelConfig(strategy=job.engine, **job.parallel)  # type: ignore[arg-type]
    engine = build_engine(parallel, PrecisionConfig(compute=job.compute, fp8=job.fp8), topology)  # type: ignore[arg-type]
    engine.prepare(model, optimizer_builder(OptimConfig(lr=1e-2, **job.optim), policies), seed=7)
    return engine, model, {name for name, policy in policies.items() if policy.fp32}


def digest(weights: dict[str, Tensor]) -> str:
    """A hash of names, shapes and bits."""
    total = hashlib.blake2b()
    for name in sorted(weights):
        total.update(f"{name}{tuple(weights[name].shape)}".encode())
        total.update(weights[name].contiguous().numpy().tobytes())
    return total.hexdigest()[:16]


def watch_dtypes(model: LanguageModel, delicate: set[str]) -> dict[str, set[str]]:
    """A dict that the next forward passes fill with the dtypes of ``delicate`` parameters as their modules see them, and of projections."""
    seen: dict[str, set[str]] = {"delicate": set(), "projected": set()}

    def watch(names: list[str]) -> Callable[..., None]:
        def before(module: Any, inputs: Any) -> None:
            seen["delicate"] |= {str(getattr(module, name).dtype) for name in names}

        return before

    for name, module in model.named_modules():
        own = [n for n, _ in module.named_parameters(recurse=False) if (f"{name}.{n}" if name else n) in delicate]
        if own:
            module.register_forward_pre_hook(watch(own))
        if name.endswith("in_proj"):
            module.register_forward_hook(lambda module, inputs, output: seen["projected"].update(str(part.dtype) for part in output))
    return seen


def run_job(job: Job, topology: Topology) -> dict[str, Any]:
    """Prepares, loads, trains, saves, evaluates; returns what was seen."""
    from mamba_pretrain.checkpoint.config import CheckpointConfig
    from mamba_pretrain.checkpoint.reading import open_checkpoint
    from mamba_pretrain.checkpoint.store import CheckpointStore
    from mamba_pretrain.training.step import all_reduce_sum, train_step

    engine, model, delicate = build(job, topology)
    result: dict[str, Any] = {"init": digest(engine.full_state_dict()), "losses": [], "norms": [], "skipped": []}
    if job.load:
        engine.load(open_checkpoint(Path(job.load), job.first or None).reader)
    seen = watch_dtypes(model, delicate)
    store = CheckpointStore(Path(job.save) / "checkpoints", CheckpointConfig(), topology) if job.save else None
    for step in range(job.first, job.steps):
        if store is not None and step == job.save_at:
            store.save(engine, step, {"tokens": step * GLOBAL_BATCH * LENGTH})
        skip = (lambda norm: True) if step in job.skip else None
        found = train_step(engine, my_batches(step, topology, job.micro), 1e-2, 0.5, skip)
        result["losses"].append(float(found.loss))
        result["norms"].append(float(found.grad_norm))
        result["skipped"].append(found.skipped)
    if store is not None:
        store.wait()
    evaluated = sum(engine.evaluate(batch) for batch in my_batches(99, topology, 2))
    result["evaluated"] = float(all_reduce_sum(evaluated))
    result["dtypes"] = {kind: sorted(dtypes) for kind, dtypes in seen.items()}
    result["final"] = digest(engine.full_state_dict())
    graphs = getattr(engine, "_graphs", None)
    result["recorded"] = len(graphs._recordings) if graphs is not None else 0
    return result


def main(folder: Path) -> None:
    """Runs ``folder/jobs.json``; rank 0 writes ``folder/results.json`` after every job."""
    from mamba_pretrain.parallel import topology as ranks
    from mamba_pretrain.parallel.config import ParallelConfig

    topology = ranks.initialize(ParallelConfig(timeout_minutes=2.0, strategy="zero1"))
    results = {}
    for job in (Job(**fields) for fields in json.loads((folder / "jobs.json").read_text())):
        began = time.perf_counter()
        results[job.key] = run_job(job, topology) | {"seconds": round(time.perf_counter() - began, 3)}
        if topology.rank == 0:
            (folder / ".results.json").write_text(json.dumps(results))
            os.replace(folder / ".results.json", folder / "results.json")
    ranks.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
