"""Every engine gives the numbers of one plain process, and every checkpoint continues under every engine: two tables.

On a CPU: engines x {Mamba-1, Mamba-2, hybrid} x {1, 2, 3, 4} processes, 20 losses each, in fp32 and bf16; then checkpoints of every engine and
number of processes, each continued by several others. `--check` exits 1 on any miss.

    python benchmarks/engine_matrix.py --check
    python benchmarks/engine_matrix.py --pairs-per-target 2 --steps 20

On GPUs, under torchrun: see ``engine_gpus.py``.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from engine_worker import TINY, Job, run_jobs

ENGINES = ("ddp", "fsdp2", "hsdp", "zero1", "zero2", "zero3")
WORLDS = (1, 2, 3, 4)
SHARD_SIZE = {2: 2, 3: 3, 4: 2}  # hsdp's
FP32 = 1e-5  # relative; sums in another order stay under 1e-6 in practice
# A weight's gradient is rounded to bf16 (relative error 2**-9) once per micro-batch; ZeRO and FSDP2 add the micro-batches up in another order.
# Over 20 steps of training that moves the loss by a few 1e-4, and by up to 9e-4 in the worst of ten draws of data (`aligned`, fsdp2 and ZeRO alike).
BF16 = 1e-3
SAVED_AT, CONTINUED = 3, 3  # a checkpoint after 3 steps, 3 more steps by whoever loads it
# Sequences per micro-batch; 12 make a step. How a step is cut into micro-batches moves a bf16 loss by up to 8e-4 in 20 steps (measured in one
# process), so bf16 runs use one sequence each. So does a loss scaled by a number that is no power of two, which therefore no engine does.
MICRO = {"fp32": 3, "bf16": 1}


def engines_of(world: int) -> tuple[str, ...]:
    """Strategies that a number of processes can run."""
    return ("single", "zero1", "zero2", "zero3") if world == 1 else ENGINES


def settings(engine: str, world: int) -> dict[str, Any]:
    """The mesh of an HSDP job."""
    return {"hsdp_shard_size": SHARD_SIZE[world]} if engine == "hsdp" else {}


def difference(found: list[float], expected: list[float]) -> float:
    """Largest relative difference."""
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))


def run_engines(steps: int, computes: list[str], root: Path) -> list[dict[str, Any]]:
    """Trains everything; a row per engine, number of processes, model and precision."""
    results = {}
    for world in WORLDS:
        jobs = [
            Job(f"{engine}-{model}-{compute}", engine, model, compute, steps=steps, micro=MICRO[compute], parallel=settings(engine, world))
            for engine in engines_of(world)
            for model in TINY
            for compute in computes
        ]
        results[world] = run_jobs(world, jobs, root / f"engines-{world}", timeout=3600)
        print(f"{world} processes: {len(jobs)} runs", flush=True)
    rows = []
    for world, found in results.items():
        for key, run in found.items():
            engine, model, compute = key.split("-")
            reference = results[1][f"single-{model}-{compute}"]
            row = {"engine": engine, "processes": world, "model": model, "compute": compute, "same_init": run["init"] == reference["init"]}
            row |= {name: difference(run[name], reference[name]) for name in ("losses", "norms")}
            row["delicate_in_fp32"] = run["dtypes"]["delicate"] == ["torch.float32"]
            limit = FP32 if compute == "fp32" else BF16
            row["good"] = row["losses"] <= limit and row["same_init"] and row["delicate_in_fp32"]
            rows.append(row)
    return rows


def run_checkpoints(pairs_per_target: int, root: Path, model: str = "hybrid") -> list[dict[str, Any]]:
    """Every engine and number of processes saves; each loads ``pairs_per_target`` of the others' and continues."""
    steps = SAVED_AT + CONTINUED
    sources = [(engine, world) for world in WORLDS for engine in engines_of(world)]
    expected: list[float] = []
    for world in WORLDS:
        jobs = [
            Job(
                engine, engine, model, steps=steps, save=str(root / f"{engine}-{world}"), save_at=SAVED_AT, parallel=settings(engine, world)
            )
            for engine in engines_of(world)
        ]
        found = run_jobs(world, jobs, root / f"save-{world}", timeout=3600)
        expected = expected or found["single"]["losses"][SAVED_AT:]
    rows = []
    for world in WORLDS:
        jobs = []
        for engine in engines_of(world):
            place = sources.index((engine, world))
            # Strides that are no multiples of each other spread the pairs over engines and numbers of processes.
            for source in (sources[(place + 1 + 7 * i) % len(sources)] for i in range(pairs_per_target)):
                folder = str(root / f"{source[0]}-{source[1]}")
                key = f"{source[0]}-{source[1]}-{engine}"
                jobs.append(
                    Job(key, engine, model, steps=steps, micro=MICRO["fp32"], first=SAVED_AT, load=folder, parallel=settings(engine, world))
                )
        for key, run in run_jobs(world, jobs, root / f"load-{world}", timeout=3600).items():
            source_engine, source_world, engine = key.split("-")
            worst = difference(run["losses"], expected)
            row = {"source": source_engine, "source_processes": int(source_world), "target": engine, "target_processes": world}
            rows.append(row | {"losses": worst, "good": worst <= FP32})
    return rows


def print_table(rows: list[dict[str, Any]]) -> None:
    """A line per row, numbers short."""
    print("  ".join(rows[0]) if rows else "")
    for row in rows:
        print("  ".join(f"{value:.1e}" if isinstance(value, float) else str(value) for value in row.values()))


def main() -> int:
    """Runs both matrices, prints, records; 1 if anything misses."""
    from record import record

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit 1 on any miss")
    parser.add_argument("--steps", type=int, default=20, help="steps of each run of the first matrix")
    parser.add_argument("--compute", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"], help="precisions of the first matrix")
    parser.add_argument(
        "--pairs-per-target", type=int, default=2, help="checkpoints each engine and number of processes continues; 0: none"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        engines = run_engines(arguments.steps, arguments.compute, Path(folder))
        checkpoints = run_checkpoints(arguments.pairs_per_target, Path(folder)) if arguments.pairs_per_target else []
    for rows in (engines, checkpoints):
        print_table(rows)
    missed = [row for row in engines + checkpoints if not row["good"]]
    print(f"{len(engines)} runs and {len(checkpoints)} source-target pairs, {len(missed)} misses")
    summary = {"runs": len(engines), "pairs": len(checkpoints), "misses": len(missed), "limits": {"fp32": FP32, "bf16": BF16}}
    print("recorded", record("engine_matrix", {"summary": summary, "engines": engines, "checkpoints": checkpoints}))
    return int(arguments.check and bool(missed))


if __name__ == "__main__":
    sys.exit(main())
