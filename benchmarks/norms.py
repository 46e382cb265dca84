"""The Triton norms against mamba_ssm's, forward and backward, in one run.

    python benchmarks/norms.py              # measures and records; needs a GPU
    python benchmarks/norms.py --variants   # times other ways to run the kernels of four shapes, or of those named, in under a minute
    python benchmarks/norms.py --check      # exit code 1 under a bar; without a GPU reads the newest record

bf16 activations, fp32 residual and weight; medians of CUDA graphs' replays, autograd wrappers on both sides. ``floor``: the bytes that must be read
and written, at the rate of a copy. Errors are those of ours against the fp32 reference on the same numbers, in the 2-norm.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from record import conclude, require_gpus, rows_of
from timing import both_passes_ms, replayed_ms

from mamba_pretrain.ops import registry, triton_norm
from mamba_pretrain.ops.rms_norm import gated_rms_norm, rms_norm
from mamba_pretrain.ops.triton_norm import EVERY_ROW, Tuning

BANDWIDTH = 3.02e9  # bytes a millisecond, read and written, of a device copy on an H100
SHAPES = {
    "rms_norm 130m": (16, 2048, 768),
    "rms_norm 370m": (16, 2048, 1024),
    "rms_norm 1.4b": (8, 2048, 2048),
    "rms_norm 2.8b": (4, 2048, 2560),
    "gated_rms_norm 370m": (16, 2048, 2048),
    "gated_rms_norm 1.3b": (8, 2048, 4096),
}
# Bytes an element: x, residual, y, new residual; dy, d(new residual), new residual, dx, d(residual). And x, z, y; dy, x, z, dx, dz.
TRAFFIC = {"rms_norm": (12, 16), "gated_rms_norm": (6, 10)}
# Ways to run a kernel besides the usual one: rows, stages, warps of a multiprocessor, channels and registers of a thread.
VARIANTS = {
    "RMS_BACKWARD": (Tuning(1, 4, 32, 4), Tuning(1, 3, 48, 4, 40), Tuning(1, 4, 48, 4, 40)),
    "GATED_FORWARD": (
        Tuning(1, 3, 32, 16, 64),
        Tuning(1, 1, EVERY_ROW, 4),
        Tuning(1, 1, EVERY_ROW, 16),
        Tuning(1, 4, 32, 16, 64),
        Tuning(1, 3, 48, 8, 40),
    ),
    "GATED_BACKWARD": (
        Tuning(1, 4, 16, 16, 128),
        Tuning(1, 3, 16, 16, 128),
        Tuning(1, 2, 16, 16, 128),
        Tuning(1, 3, 32, 8, 64),
        Tuning(1, 4, 32, 4),
    ),
}
VARIED = ("gated_rms_norm 1.3b", "gated_rms_norm 370m", "rms_norm 1.4b", "rms_norm 370m")
SUMS = ((264, 2048), (264, 4096), (528, 2048), (528, 1024))  # parts of a weight's gradient
FURTHEST_FROM_FLOOR = 1.35
LARGEST_ERROR = 6e-3

Both = Callable[[], tuple[Tensor, ...]]


def calls(name: str, implementation: str, dtype: torch.dtype = torch.bfloat16) -> tuple[Callable[[], Any], Both]:
    """Forward, and both passes: gradients of all inputs."""
    torch.manual_seed(0)
    op, shape = name.split()[0], SHAPES[name]
    low, weight = torch.randn(2, *shape, device="cuda").bfloat16().to(dtype), torch.randn(shape[-1], device="cuda")
    if op == "rms_norm":
        inputs = [low[0], weight, torch.randn(shape, device="cuda")]
        given = (low[1], torch.randn(shape, device="cuda"))
    else:
        inputs = [low[0], low[1], weight]
        given = (torch.randn(shape, device="cuda").bfloat16().to(dtype),)
    inputs = [t.requires_grad_() for t in inputs]

    def forward() -> Any:
        with registry.using(**{op: implementation}):
            if op == "rms_norm":
                return rms_norm(inputs[0], inputs[1], 1e-5, residual=inputs[2])
            return gated_rms_norm(*inputs, 1e-5)

    return forward, lambda: torch.autograd.grad(forward(), inputs, given)


def measure_one(name: str) -> dict[str, Any]:
    """A row."""
    shape, traffic = SHAPES[name], TRAFFIC[name.split()[0]]
    floor = [shape[0] * shape[1] * shape[2] * each / BANDWIDTH for each in traffic]
    row: dict[str, Any] = {"shape": name, "floor": {"forward_ms": floor[0], "backward_ms": floor[1], "both_ms": sum(floor)}}
    ours = calls(name, "triton")
    row["ours"] = both_passes_ms(*ours)
    row["bit_equal"] = all(torch.equal(a, b) for a, b in zip(ours[1](), ours[1](), strict=True))
    exact = calls(name, "reference", torch.float32)[1]()
    row["error"] = max(((a.float() - b).norm() / b.norm()).item() for a, b in zip(ours[1](), exact, strict=True))
    try:
        row["mamba_ssm"] = both_passes_ms(*calls(name, "mamba_ssm"))
    except Exception as missing:
        return {**row, "mamba_ssm": None, "why": " ".join(str(missing).split())[:200]}
    return {**row, "speedup": row["mamba_ssm"]["both_ms"] / row["ours"]["both_ms"]}


def failures(rows: list[dict[str, Any]]) -> list[str]:
    """What is slower than mamba_ssm's, far from the floor, wrong or not repeatable, in words."""
    measured = {row["shape"] for row in rows}
    failed = [f"{shape}: not measured" for shape in SHAPES if shape not in measured]
    for row in rows:
        distance = row["ours"]["both_ms"] / row["floor"]["both_ms"]
        if distance > FURTHEST_FROM_FLOOR:
            failed.append(f"{row['shape']}: {distance:.2f} times what its bytes take, {FURTHEST_FROM_FLOOR} allowed")
        if row["mamba_ssm"] is None:
            failed.append(f"{row['shape']}: not compared with mamba_ssm ({row['why']})")
        elif row["speedup"] < 1:
            failed.append(f"{row['shape']}: {row['speedup']:.2f} times as fast as mamba_ssm's")
        if not row["bit_equal"]:
            failed.append(f"{row['shape']}: two runs differ")
        if not row["error"] <= LARGEST_ERROR:
            failed.append(f"{row['shape']}: error {row['error']:.1e}, {LARGEST_ERROR:.0e} allowed")
    return failed


def show(rows: list[dict[str, Any]]) -> None:
    """The table."""
    for row in rows:
        print(f"{row['shape']}: error {row['error']:.1e}, {row['ours']['both_ms'] / row['floor']['both_ms']:.2f} times the floor")
        for side in ("floor", "ours", "mamba_ssm"):
            if row[side]:
                print(f"    {side:<10} " + ", ".join(f"{key.removesuffix('_ms')} {value:.3f}" for key, value in row[side].items()) + " ms")


def variants(names: list[str]) -> None:
    """Kernels run in other ways, the fastest last; ``triton_norm.Tuning`` says what is varied."""
    for name in names:
        forward, both = calls(name, "triton")
        gated, traffic = name.startswith("gated"), TRAFFIC[name.split()[0]]
        if gated:
            compare_tunings(name, "GATED_FORWARD", traffic[0], forward)
        compare_tunings(name, "GATED_BACKWARD" if gated else "RMS_BACKWARD", traffic[1], both, replayed_ms(forward, 30))
    for parts, n in SUMS:
        values, weight = torch.randn(parts, n, device="cuda"), torch.empty(n, device="cuda")
        runs = (functools.partial(triton_norm._sum_parts, values, weight), functools.partial(values.sum, 0))
        ours, torchs = (1e3 * replayed_ms(run, 10) for run in runs)
        print(f"sum of {parts} parts of {n}: {ours:.1f} us, torch's {torchs:.1f} us", flush=True)


def compare_tunings(name: str, tuned: str, traffic: int, run: Callable[[], Any], besides: float = 0.0) -> None:
    """Prints the milliseconds of ``run``, less those of what it runs besides, under every tuning of one kernel."""
    batch, length, channels = SHAPES[name]
    floor, usual, found = batch * length * channels * traffic / BANDWIDTH, getattr(triton_norm, tuned), []
    print(f"{name} {tuned}: floor {floor:.3f} ms", flush=True)
    for tuning in (usual, *VARIANTS[tuned]):
        setattr(triton_norm, tuned, {triton_norm.MAX_CHANNELS: tuning} if isinstance(usual, dict) and tuning is not usual else tuning)
        try:
            found.append((replayed_ms(run, 30) - besides, f"{tuning}{' as usual' if tuning is usual else ''}"))
        except RuntimeError as refused:
            print(f"    {tuning}: {' '.join(str(refused).split())[:200]}", flush=True)
        finally:
            setattr(triton_norm, tuned, usual)
    for milliseconds, words in sorted(found, reverse=True):
        print(f"    {milliseconds:.3f} ms, {milliseconds / floor:.2f} times the floor: {words}", flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit 1 under a bar; without a GPU reads the newest record")
    parser.add_argument("--variants", nargs="*", metavar="SHAPE", help="times other ways to run the kernels; needs a GPU")
    arguments = parser.parse_args()
    if arguments.variants is not None:
        require_gpus(parser)
        variants(arguments.variants or list(VARIED))
        return
    rows = rows_of("norms", lambda: (measure_one(name) for name in SHAPES))
    show(rows)
    conclude(failures(rows) if arguments.check else [])


if __name__ == "__main__":
    main()
