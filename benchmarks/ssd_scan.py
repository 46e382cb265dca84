"""Mamba-2's scan in Triton against mamba-ssm's, forward and backward, in one run.

    python benchmarks/ssd_scan.py              # measures, checks, records; needs a GPU (mamba-ssm is compared if it is installed)
    python benchmarks/ssd_scan.py --variants   # times every kernel under other launches; records nothing
    python benchmarks/ssd_scan.py --check      # without a GPU: reads the newest record; exit code 1 under a bar

Both are called through the registry with autograd, on views of one tensor as a Mamba-2 mixer has them; medians of repeated runs. Errors are against
the fp64 recurrence on some heads (dB and dC, which sum over all heads, and long sequences only against mamba-ssm). ``--only N`` takes the first N
shapes, ``--ours`` leaves mamba-ssm out, whose autotuning takes most of a first run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent))
from record import conclude, require_gpus, rows_of

# (batch, length, heads, headdim, states, groups): least speed-up over mamba-ssm of both passes.
SHAPES: dict[tuple[int, int, int, int, int, int], float] = {
    (8, 2048, 64, 64, 128, 1): 2.0,
    (16, 2048, 24, 64, 128, 1): 1.5,
    (16, 2048, 32, 64, 128, 1): 1.5,
    (1, 32768, 64, 64, 128, 1): 1.5,
}
MOST_MILLISECONDS = {(8, 2048, 64, 64, 128, 1): 1.4}
SEQ_IDX_COST = 0.05
NAMES = ("x", "dt", "A", "B", "C", "D", "dt_bias")
SLICE = 4  # heads that the fp64 recurrence follows
MORE_ERROR = {
    "y": 1.05,
    "dx": 1.05,
    "ddt": 1.05,
}  # than mamba-ssm's that is allowed; the others are so few numbers that their errors scatter
SCATTER = 2.0


def make(batch: int, length: int, heads: int, width: int, states: int, groups: int) -> tuple[dict[str, Tensor], Tensor]:
    """Inputs as a mixer has them, bf16, and the gradient of y."""
    torch.manual_seed(0)
    new: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
    sizes = [heads * width, groups * states, groups * states]
    x, B, C = torch.randn(batch, length, sum(sizes), **new).split(sizes, dim=-1)
    dt = torch.randn(batch, length, 64 + heads, **new)[..., 64:]
    A = -1 - 15 * torch.rand(heads, device="cuda")
    step = torch.exp(torch.empty(heads, device="cuda").uniform_(-6.9, -2.3))
    bias = step + torch.log(-torch.expm1(-step))
    B, C = (t.unflatten(-1, (groups, states)) for t in (B, C))
    values = (x.unflatten(-1, (heads, width)), dt, A, B, C, torch.randn(heads, device="cuda"), bias)
    return {k: t.detach().requires_grad_() for k, t in zip(NAMES, values, strict=True)}, torch.randn(batch, length, heads, width, **new)


def median_ms(run: Callable[[], Any]) -> float:
    """Milliseconds of a run, median over about 100 ms after a warm-up."""
    from triton.testing import do_bench

    return float(do_bench(run, warmup=20, rep=100, return_mode="median"))


def timed(forward: Callable[[], Tensor], backward: Callable[[], Any]) -> dict[str, float]:
    """Forward, backward (both less forward) and both."""
    alone, both = median_ms(forward), median_ms(backward)
    return {"forward_ms": alone, "backward_ms": both - alone, "both_ms": both}


def passes(
    name: str, inputs: dict[str, Tensor], dy: Tensor, seq_idx: Tensor | None = None
) -> tuple[Callable[[], Tensor], Callable[[], Any]]:
    """Calls of one implementation: forward alone, and both passes."""
    from mamba_pretrain.ops import registry
    from mamba_pretrain.ops.ssd_scan import ssd_scan

    def forward() -> Tensor:
        with registry.using(ssd_scan=name):
            return ssd_scan(**inputs, seq_idx=seq_idx)

    return forward, lambda: torch.autograd.grad(forward(), list(inputs.values()), dy)


def exact(inputs: dict[str, Tensor], dy: Tensor) -> dict[str, Tensor]:
    """y and gradients by the fp64 recurrence, for the first SLICE heads."""
    t = {k: v.detach().double() for k, v in inputs.items()}
    x, dt = (t[k][:, :, :SLICE].requires_grad_() for k in ("x", "dt"))
    A, D, bias = (t[k][:SLICE].requires_grad_() for k in ("A", "D", "dt_bias"))
    B, C = t["B"][:, :, 0], t["C"][:, :, 0]
    step = F.softplus(dt + bias, threshold=1e4)
    decay, added = torch.exp(step * A), step[..., None] * x
    state, ys = x.new_zeros(*x.shape[:1], *x.shape[2:], B.shape[-1]), []
    for i in range(x.shape[1]):
        state = decay[:, i, :, None, None] * state + added[:, i, ..., None] * B[:, i, None, None, :]
        ys.append((state @ C[:, i, None, :, None])[..., 0])
    y = torch.stack(ys, 1) + D[:, None] * x
    gradients = torch.autograd.grad(y, [x, dt, A, D, bias], dy[:, :, :SLICE].double())
    return {"y": y.detach(), **dict(zip(("dx", "ddt", "dA", "dD", "ddt_bias"), gradients, strict=True))}


def error(found: Tensor, expected: Tensor) -> float:
    """Relative, in the 2-norm."""
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def errors(run: tuple[Callable[[], Tensor], Callable[[], Any]], expected: dict[str, Tensor]) -> dict[str, float]:
    """Of what ``exact`` gives."""
    found = {"y": run[0](), **{f"d{k}": t for k, t in zip(NAMES, run[1](), strict=True)}}
    return {k: error(found[k][:, :, :SLICE] if found[k].dim() > 1 else found[k][:SLICE], t) for k, t in expected.items()}


def floors(batch: int, length: int, heads: int, width: int, states: int, groups: int) -> dict[str, float]:
    """Milliseconds for the bytes of inputs and outputs alone at 3 TB/s (an H100's copy bandwidth)."""
    tokens = batch * length
    shared, vector = 2 * tokens * groups * states * 2, tokens * heads * 2
    values = tokens * heads * width * 2
    return {"forward_bytes_ms": (2 * values + shared + vector) / 3e9, "backward_bytes_ms": (3 * values + 2 * shared + 2 * vector) / 3e9}


def measure(size: tuple[int, int, int, int, int, int], peer: bool) -> dict[str, Any]:
    """One row of the table."""
    batch, length, heads, width, states, groups = size
    inputs, dy = make(*size)
    shape = f"B{batch} L{length} H{heads} P{width} N{states} G{groups}"
    row: dict[str, Any] = {"shape": shape, "size": size, "floors": floors(*size)}
    run = passes("triton", inputs, dy)
    row["ours"] = timed(*run)
    expected = exact(inputs, dy) if length <= 2048 else {}
    row["errors"] = errors(run, expected)
    row["bit_equal"] = all(torch.equal(a, b) for a, b in zip(run[1](), run[1](), strict=True))
    seq_idx = (torch.rand(batch, length, device="cuda") < 0.002).int().cumsum(1).int()
    row["with_seq_idx"] = timed(*passes("triton", inputs, dy, seq_idx))
    if not peer:
        return {**row, "mamba_ssm": None}
    theirs = passes("mamba_ssm", inputs, dy)
    row["mamba_ssm"] = timed(*theirs)
    row["mamba_ssm_errors"] = errors(theirs, expected)
    row["difference"] = {name: error(a, b) for name, a, b in zip(NAMES, run[1](), theirs[1](), strict=True)}
    row["speedup"] = {k: row["mamba_ssm"][f"{k}_ms"] / row["ours"][f"{k}_ms"] for k in ("forward", "backward", "both")}
    return row


def seq_idx_cost(row: dict[str, Any]) -> float:
    """Share by which document boundaries slow both passes down."""
    return float(row["with_seq_idx"]["both_ms"] / row["ours"]["both_ms"] - 1)


def failures(rows: list[dict[str, Any]]) -> list[str]:
    """What is under its bar, in words."""
    measured = {tuple(row["size"]) for row in rows}
    failed = [f"{size}: not measured" for size in SHAPES if size not in measured]
    for row in rows:
        size, shape = tuple(row["size"]), row["shape"]
        found = row.get("speedup", {}).get("both")
        if found is None or found < SHAPES[size]:
            failed.append(f"{shape}: {found and round(found, 2)} times as fast as mamba-ssm, {SHAPES[size]} wanted")
        if row["ours"]["both_ms"] > MOST_MILLISECONDS.get(size, float("inf")):
            failed.append(f"{shape}: both passes take {row['ours']['both_ms']:.2f} ms, {MOST_MILLISECONDS[size]} wanted")
        if seq_idx_cost(row) > SEQ_IDX_COST:
            failed.append(f"{shape}: seq_idx costs {seq_idx_cost(row):.1%}, {SEQ_IDX_COST:.0%} allowed")
        if not row["bit_equal"]:
            failed.append(f"{shape}: two runs differ")
        for name, theirs in row.get("mamba_ssm_errors", {}).items():
            if row["errors"][name] > MORE_ERROR.get(name, SCATTER) * theirs:
                failed.append(f"{shape}: error of {name} is {row['errors'][name]:.1e}, mamba-ssm's {theirs:.1e}")
    return failed


def show(rows: list[dict[str, Any]]) -> None:
    """The table."""
    for row in rows:
        ours, theirs = row["ours"], row["mamba_ssm"]
        line = (
            f"{row['shape']:<32} forward {ours['forward_ms']:.3f} backward {ours['backward_ms']:.3f} ms, seq_idx {seq_idx_cost(row):+.1%}"
        )
        if theirs:
            speedup = " / ".join(f"{v:.2f}x" for v in row["speedup"].values())
            line += f"; mamba-ssm {theirs['forward_ms']:.3f} {theirs['backward_ms']:.3f} ms: {speedup}"
        print(line)
        print(f"    floors: {', '.join(f'{k[:-3]} {v:.2f} ms' for k, v in row['floors'].items())}; equal bits: {row['bit_equal']}")
        for label in ("errors", "mamba_ssm_errors", "difference"):
            if row.get(label):
                print(f"    {label}: {', '.join(f'{k} {v:.1e}' for k, v in row[label].items())}")


def kernel_times(run: Callable[[], Any], repeats: int = 8) -> dict[str, float]:
    """Milliseconds of each of our kernels in one run, by the profiler."""
    from torch.profiler import ProfilerActivity, profile

    run()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(repeats):
            run()
        torch.cuda.synchronize()
    found: dict[str, float] = {}
    for event in profiled.key_averages():
        name = event.key if event.key.startswith("ssd_") else "others"
        found[name] = found.get(name, 0.0) + event.self_device_time_total / repeats / 1e3
    return found


def variants(only: int) -> None:
    """Times every kernel under launches beside those of the table."""
    from mamba_pretrain.ops import triton_ssd
    from mamba_pretrain.ops.triton_ssd import Launch

    base = triton_ssd.HOPPER
    # Kernels are timed one by one, so a candidate tries something for each of them.
    tried = {
        "table": base,
        "shallow": replace(base, forward=Launch(4, 1), states=Launch(4, 2), inside=Launch(4, 1), edges=Launch(4, 2)),
        "deep": replace(base, forward=Launch(4, 3), states=Launch(4, 4), inside=Launch(4, 3), edges=Launch(4, 4)),
        "eight warps": replace(base, forward=Launch(8, 2), states=Launch(8, 2), inside=Launch(8, 2), edges=Launch(8, 2)),
        "fewer heads": replace(base, heads=base.heads // 2, keep=not base.keep),
        "more heads": replace(base, heads=2 * base.heads, state_block=base.state_block // 2),
        "eight narrow warps": replace(base, states=Launch(8, 2, 128), edges=Launch(8, 2, 128), forward=Launch(4, 2)),
        "two tiles": replace(base, tiles=2, states=Launch(8, 2, 128), edges=Launch(8, 2, 128)),
    }
    for size in list(SHAPES)[:only]:
        inputs, dy = make(*size)
        print(f"B{size[0]} L{size[1]} H{size[2]} P{size[3]} N{size[4]} G{size[5]}")
        for name, candidate in tried.items():
            triton_ssd.HOPPER = candidate
            try:
                times = kernel_times(passes("triton", inputs, dy)[1])
            except Exception as failure:
                print(f"  {name}: {type(failure).__name__}: {str(failure).splitlines()[0][:120]}")
                continue
            parts = " ".join(f"{k.removeprefix('ssd_')} {v:.3f}" for k, v in sorted(times.items()))
            print(f"  {name:<24} {sum(times.values()):.3f} ms: {parts}", flush=True)
    triton_ssd.HOPPER = base


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit 1 under a bar; without a GPU reads the newest record")
    parser.add_argument("--variants", action="store_true", help="time launches")
    parser.add_argument("--only", type=int, default=len(SHAPES), help="of the shapes")
    parser.add_argument("--ours", action="store_true", help="without mamba-ssm")
    arguments = parser.parse_args()
    if arguments.variants:
        require_gpus(parser)
        variants(arguments.only)
        return
    rows = rows_of("ssd_scan", lambda: (measure(size, not arguments.ours) for size in list(SHAPES)[: arguments.only]))
    show(rows)
    conclude(failures(rows) if arguments.check else [])


if __name__ == "__main__":
    main()
