"""The selective scan's kernels against mamba-ssm's, forward and backward, in one run.

    python benchmarks/selective_scan.py            # measures, checks, records; needs a GPU (mamba-ssm is compared if it is installed)
    python benchmarks/selective_scan.py --tune     # times every block shape of the tuning table and some beside it; records nothing
    python benchmarks/selective_scan.py --check    # without a GPU: reads the newest record; exit code 1 under a bar

Both sides are timed through their autograd wrappers, on the layouts they take (ours: u and z halves of one tensor, B and C slices of
another; mamba-ssm: channel-first and contiguous), medians of repeated runs. Correctness is checked at the timed shapes: against mamba-ssm
everywhere, and against the fp64 recurrence on a few channels of one row (dB and dC, which sum over all channels, only against mamba-ssm).
The record grows shape by shape: a run that is cut off leaves what it measured.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent))
from record import conclude, require_gpus, rows_of

# (batch, channels, length, states): least speed-up over mamba-ssm of (forward, backward, both); None where there is no bar.
SHAPES: dict[tuple[int, int, int, int], tuple[float | None, float | None, float | None]] = {
    (8, 4096, 2048, 16): (2.3, 3.5, None),
    (16, 1536, 2048, 16): (2.3, 3.5, None),
    (16, 2048, 2048, 16): (2.3, 3.5, None),
    (1, 4096, 65536, 16): (None, None, 3.0),
}
MOST_MILLISECONDS = {(8, 4096, 2048, 16): 1.7}
SEQ_IDX_COST = 0.02
NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
SLICE = 8  # channels that the fp64 recurrence follows
EXP_PER_CLOCK = 16  # of a multiprocessor's special-function unit


def make(batch: int, channels: int, length: int, states: int) -> tuple[dict[str, Tensor], Tensor]:
    """Inputs as a mixer has them, bf16, and the gradient of y."""
    torch.manual_seed(0)
    new: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
    u, z = torch.randn(batch, length, 2 * channels, **new).chunk(2, dim=-1)
    _, B, C = torch.randn(batch, length, 64 + 2 * states, **new).split([64, states, states], dim=-1)
    delta = (torch.randn(batch, length, channels, device="cuda") - 2).to(torch.bfloat16)
    A = -4 * torch.rand(channels, states, device="cuda") - 0.01
    D, bias = torch.randn(channels, device="cuda"), 0.5 * torch.randn(channels, device="cuda")
    inputs = dict(zip(NAMES, (u, delta, A, B, C, D, z, bias), strict=True))
    return {k: t.detach().requires_grad_() for k, t in inputs.items()}, torch.randn(batch, length, channels, **new)


def median_ms(run: Callable[[], Any]) -> float:
    """Milliseconds of a run, median over about 100 ms after a warm-up."""
    from triton.testing import do_bench

    return float(do_bench(run, warmup=20, rep=100, return_mode="median"))


def timed(forward: Callable[[], Tensor], backward: Callable[[], Any]) -> dict[str, float]:
    """Forward, backward (both less forward) and both."""
    alone, both = median_ms(forward), median_ms(backward)
    return {"forward_ms": alone, "backward_ms": both - alone, "both_ms": both}


def ours(inputs: dict[str, Tensor], dy: Tensor, seq_idx: Tensor | None = None) -> tuple[Callable[[], Tensor], Callable[[], Any]]:
    """Calls through the registry."""
    from mamba_pretrain.ops import registry
    from mamba_pretrain.ops.selective_scan import selective_scan

    def forward() -> Tensor:
        with registry.using(selective_scan="cuda"):
            return selective_scan(**inputs, seq_idx=seq_idx)

    return forward, lambda: torch.autograd.grad(forward(), list(inputs.values()), dy)


def mamba_ssm(inputs: dict[str, Tensor], dy: Tensor) -> tuple[Callable[[], Tensor], Callable[[], Any]]:
    """Its own function on its own layout; results come back channel-last."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    def turned(t: Tensor) -> Tensor:
        return t.detach().transpose(1, 2).contiguous().requires_grad_() if t.dim() == 3 else t.detach().requires_grad_()

    own = {k: turned(t) for k, t in inputs.items()}
    upstream = dy.transpose(1, 2).contiguous()

    def forward() -> Tensor:
        return selective_scan_fn(*(own[k] for k in NAMES[:6]), z=own["z"], delta_bias=own["delta_bias"], delta_softplus=True)

    return forward, lambda: torch.autograd.grad(forward(), list(own.values()), upstream)


def exact(inputs: dict[str, Tensor], dy: Tensor) -> list[Tensor]:
    """y and gradients of u, delta, z by the fp64 recurrence, for the first SLICE channels of the last row."""
    sequences = {k: inputs[k].detach()[-1:].double() for k in ("u", "delta", "B", "C", "z")}
    u, delta, z = (sequences[k][..., :SLICE].requires_grad_() for k in ("u", "delta", "z"))
    A, D, bias = (inputs[k].detach()[:SLICE].double() for k in ("A", "D", "delta_bias"))
    step = F.softplus(delta + bias, threshold=1e4)
    # One launch a step forward and few backward: all that does not depend on the state is computed at once.
    decays, inflows = torch.exp(step[..., None] * A), (step * u)[..., None] * sequences["B"][:, :, None]
    state, states = u.new_zeros(1, *A.shape), []
    for decay, inflow in zip(decays.unbind(1), inflows.unbind(1), strict=True):
        state = torch.addcmul(inflow, decay, state)
        states.append(state)
    y = ((torch.stack(states, 1) * sequences["C"][:, :, None]).sum(-1) + D * u) * F.silu(z)
    return [y, *torch.autograd.grad(y, [u, delta, z], dy[-1:, :, :SLICE].double())]


def error(found: Tensor, expected: Tensor) -> float:
    """Relative, in the 2-norm."""
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def errors(expected: list[Tensor], run: tuple[Callable[[], Tensor], Callable[[], Any]], turn: bool) -> dict[str, float]:
    """Of y, du, ddelta and dz against the fp64 recurrence; nothing where that was not ``expected``."""
    if not expected:
        return {}
    forward, backward = run
    gradients = dict(zip(NAMES, backward(), strict=True))
    found = [forward(), gradients["u"], gradients["delta"], gradients["z"]]
    found = [(t.transpose(1, 2) if turn else t)[-1:, :, :SLICE] for t in found]
    return {name: error(a, b) for name, a, b in zip(("y", "du", "ddelta", "dz"), found, expected, strict=True)}


def floors(batch: int, channels: int, length: int, states: int) -> dict[str, float]:
    """Milliseconds that no version can beat: exponentials at the boost clock, and bytes at 3 TB/s (an H100's copy bandwidth)."""
    properties = torch.cuda.get_device_properties(0)
    clock = getattr(properties, "clock_rate", 1_980_000) * 1e3
    elements, decays = batch * channels * length, batch * channels * length * states
    rate = properties.multi_processor_count * EXP_PER_CLOCK * clock / 1e3
    checkpoint = decays * 4 / 16
    return {
        "forward_exponentials_ms": (decays + 4 * elements) / rate,
        "forward_bytes_ms": (elements * 2 * 4 + checkpoint) / 3e9,
        "backward_exponentials_ms": (1.75 * decays + 7 * elements) / rate,
        "backward_bytes_ms": (elements * 2 * 7 + checkpoint) / 3e9,
    }


def buffers(inputs: dict[str, Tensor]) -> dict[str, int]:
    """Bytes kept between the passes, and of working memory in the backward pass."""
    from mamba_pretrain.ops import cuda_scan_kernels as kernels

    ops = kernels.Operands(**{k: t.detach() for k, t in inputs.items()}, seq_idx=None)
    shape = ops.shape("scan_backward")
    return {
        "checkpoint_bytes": ops.batch * ops.tiles * ops.channels * ops.states * 4,
        "partial_bytes": ops.batch * shape.blocks * 2 * ops.length * ops.states * 4,
    }


def measure(size: tuple[int, int, int, int]) -> dict[str, Any]:
    """One row of the table."""
    began = time.monotonic()
    batch, channels, length, states = size
    inputs, dy = make(*size)
    row: dict[str, Any] = {"shape": f"B{batch} D{channels} L{length} N{states}", "size": size, **buffers(inputs), "floors": floors(*size)}
    run = ours(inputs, dy)
    row["ours"] = timed(*run)
    expected = exact(inputs, dy) if length <= 4096 else []
    row["errors"] = errors(expected, run, turn=False)
    row["bit_equal"] = all(torch.equal(a, b) for a, b in zip(run[1](), run[1](), strict=True))
    seq_idx = (torch.rand(batch, length, device="cuda") < 0.005).int().cumsum(1).int()
    row["with_seq_idx"] = timed(*ours(inputs, dy, seq_idx))
    try:
        theirs = mamba_ssm(inputs, dy)
    except ImportError as missing:
        return {**row, "mamba_ssm": None, "why": str(missing)}
    row["mamba_ssm"] = timed(*theirs)
    row["mamba_ssm_errors"] = errors(expected, theirs, turn=True)
    pairs = zip(NAMES, run[1](), theirs[1](), strict=True)
    row["difference"] = {name: error(a, b.transpose(1, 2) if b.dim() == 3 else b) for name, a, b in pairs}
    row["speedup"] = {k: row["mamba_ssm"][f"{k}_ms"] / row["ours"][f"{k}_ms"] for k in ("forward", "backward", "both")}
    row["took_seconds"] = round(time.monotonic() - began, 1)
    return row


def measure_all() -> Iterator[dict[str, Any]]:
    """The table's rows. All kernels are compiled first, side by side: one after another they would take longer than the rest."""
    from mamba_pretrain.ops import cuda_scan_kernels as kernels

    def compile_for(case: tuple[tuple[int, int, int, int], bool]) -> None:
        (batch, channels, length, states), has_seq = case
        kernels.warm_up(torch.bfloat16, batch, length, channels, states, device=0, has_seq=has_seq)

    began = time.monotonic()
    with ThreadPoolExecutor() as pool:
        list(pool.map(compile_for, itertools.product(SHAPES, (False, True))))
    print(f"compiled in {time.monotonic() - began:.1f} s")
    for size in SHAPES:
        yield measure(size)


def seq_idx_cost(row: dict[str, Any]) -> float | None:
    """Share by which document boundaries slow both passes down; None if that was not measured."""
    return row["with_seq_idx"]["both_ms"] / row["ours"]["both_ms"] - 1 if "with_seq_idx" in row else None


def failures(rows: list[dict[str, Any]]) -> list[str]:
    """What is under its bar, in words."""
    failed: list[str] = []
    measured = {tuple(row["size"]) for row in rows}
    failed += [f"B{b} D{d} L{l} N{n}: not measured" for b, d, l, n in SHAPES if (b, d, l, n) not in measured]
    for row in rows:
        size, shape = tuple(row["size"]), row["shape"]
        for name, bar in zip(("forward", "backward", "both"), SHAPES[size], strict=True):
            found = row.get("speedup", {}).get(name)
            if bar is not None and (found is None or found < bar):
                failed.append(f"{shape}: {name} is {found and round(found, 2)} times as fast as mamba-ssm's, {bar} wanted")
        if row["ours"]["both_ms"] > MOST_MILLISECONDS.get(size, float("inf")):
            failed.append(f"{shape}: both passes take {row['ours']['both_ms']:.2f} ms, {MOST_MILLISECONDS[size]} wanted")
        extra = seq_idx_cost(row)
        if extra is None or extra > SEQ_IDX_COST:
            failed.append(f"{shape}: seq_idx costs {'an unknown share' if extra is None else f'{extra:.1%}'}, {SEQ_IDX_COST:.0%} allowed")
        if not row.get("bit_equal"):
            failed.append(f"{shape}: two runs differ, or were not compared")
        for name, theirs in row.get("mamba_ssm_errors", {}).items():
            if row["errors"][name] > 1.02 * theirs:
                failed.append(f"{shape}: error of {name} is {row['errors'][name]:.1e}, mamba-ssm's {theirs:.1e}")
    return failed


def show(rows: list[dict[str, Any]]) -> None:
    """The table."""
    for row in rows:
        ours_, theirs, extra = row["ours"], row["mamba_ssm"], seq_idx_cost(row)
        line = f"{row['shape']:<24} forward {ours_['forward_ms']:.3f} backward {ours_['backward_ms']:.3f} ms"
        line += "" if extra is None else f", seq_idx {extra:+.1%}"
        if theirs:
            speedup = " / ".join(f"{v:.2f}x" for v in row["speedup"].values())
            line += f"; mamba-ssm {theirs['forward_ms']:.3f} {theirs['backward_ms']:.3f} ms: {speedup}"
        print(line)
        for name, value in row["floors"].items():
            print(f"    floor: {name[:-3].replace('_', ' ')} {value:.2f} ms")


def carry_both_ways(ops: Any, dy: Tensor) -> None:
    """What segments receive, forward and backward."""
    from mamba_pretrain.ops import cuda_scan_kernels as kernels

    kernels.received_by_segments(ops, ops.cut(ops.shape("scan_forward").segments), ops.u, None, reverse=False)
    kernels.received_by_segments(ops, ops.cut(ops.shape("scan_backward").segments), dy, None, reverse=True)


def tune() -> None:
    """Times the passes for block shapes beside those of the table."""
    from mamba_pretrain.ops import cuda_scan_kernels as kernels

    def shapes(resident: int, lane_channels: int, sizes: tuple[int, ...], polynomials: tuple[int, ...]) -> list[kernels.Tuning]:
        return [kernels.Tuning(lane_channels, resident, (w,), polynomial_every=p) for w in sizes for p in polynomials]

    tried = {
        "scan_forward": shapes(16, 2, (2, 4, 8), (0, 8, 4)),
        "scan_carry": shapes(8, 4, (1, 2, 4), (0, 16)) + shapes(16, 2, (1, 4), (0,)),
        "scan_backward": shapes(8, 4, (4, 8), (0, 16)) + shapes(12, 2, (4, 12), (0,)),
    }
    table = dict(kernels.HOPPER)
    for size in SHAPES:
        inputs, dy = make(*size)
        ops = kernels.Operands(**{k: t.detach() for k, t in inputs.items()}, seq_idx=None)
        print(f"B{size[0]} D{size[1]} L{size[2]} N{size[3]}")
        for name, candidate in ((name, candidate) for name, candidates in tried.items() for candidate in candidates):
            if name == "scan_carry" and ops.shape("scan_forward").segments == 1:
                continue
            kernels.HOPPER.update(table, **{name: (candidate,)})
            kernels.shape.cache_clear()
            checkpoints = kernels.forward(ops, None, True)[2]  # in the order of the backward kernel's shape
            passes: dict[str, Callable[[], Any]] = {
                "scan_forward": functools.partial(kernels.forward, ops, None, True),
                "scan_carry": functools.partial(carry_both_ways, ops, dy),
                "scan_backward": functools.partial(kernels.backward, ops, dy, None, checkpoints),
            }
            print(f"  {name} {candidate}: {median_ms(passes[name]):.3f} ms")
    kernels.HOPPER.update(table)
    kernels.shape.cache_clear()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit 1 under a bar; without a GPU reads the newest record")
    parser.add_argument("--tune", action="store_true", help="time block shapes")
    arguments = parser.parse_args()
    if arguments.tune:
        require_gpus(parser)
        tune()
        return
    rows = rows_of("selective_scan", measure_all)
    show(rows)
    conclude(failures(rows) if arguments.check else [])


if __name__ == "__main__":
    main()
