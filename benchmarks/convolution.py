"""The causal convolution's kernels against causal-conv1d's, forward and backward, in one run.

    python benchmarks/convolution.py            # measures and records; needs a GPU (causal-conv1d is compared if it is installed)
    python benchmarks/convolution.py --check    # exit code 1 under a bar; without a GPU reads the newest record

bf16, 4 taps, fp32 weights, silu; inputs are slices of an in_proj's output, as mixers have them. Both sides are called through the registry
and autograd, medians of repeated runs. Errors are those of our y, dx, dweight and dbias against the reference in fp32, in the 2-norm. The
floor is the bytes that must move (x, y; x, dy, dx) at 3 TB/s, an H100's copy bandwidth.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from record import conclude, rows_of
from timing import both_passes_ms

# (batch, length, channels, channels of the tensor that they are a slice of, first of them)
SHAPES = {
    "Mamba-1 370m B16": (16, 2048, 2048, 4096, 0),
    "Mamba-1 1.4b B8": (8, 2048, 4096, 8192, 0),
    "Mamba-2 370m B16": (16, 2048, 2048 + 256, 2 * 2048 + 256 + 32, 2048),
}
BANDWIDTH = 3.0e9  # bytes a millisecond
NAMES = ("y", "dx", "dweight", "dbias")
LARGEST_ERROR = {"y": 4e-3, "dx": 4e-3, "dweight": 1e-3, "dbias": 1e-3}  # bf16 rounds results by up to 2^-9


def make(shape: tuple[int, int, int, int, int]) -> tuple[list[Tensor], Tensor]:
    """x, weight, bias, and the gradient of y."""
    torch.manual_seed(0)
    batch, length, channels, width, first = shape
    x = torch.randn(batch, length, width, device="cuda", dtype=torch.bfloat16)[..., first : first + channels]
    weight, bias = 0.3 * torch.randn(channels, 4, device="cuda"), 0.3 * torch.randn(channels, device="cuda")
    inputs = [t.detach().requires_grad_() for t in (x, weight, bias)]
    return inputs, torch.randn(batch, length, channels, device="cuda", dtype=torch.bfloat16)


def calls(name: str, inputs: list[Tensor], dy: Tensor, seq_idx: Tensor | None) -> tuple[Callable[[], Tensor], Callable[[], Any]]:
    """The forward pass, and both, of an implementation."""
    from mamba_pretrain.ops import registry
    from mamba_pretrain.ops.causal_conv1d import causal_conv1d

    def forward() -> Tensor:
        with registry.using(causal_conv1d=name):
            y = causal_conv1d(*inputs, seq_idx=seq_idx)
        assert isinstance(y, Tensor)
        return y

    def both() -> list[Tensor]:
        y = forward()
        return [y.detach(), *torch.autograd.grad(y, inputs, dy)]

    return forward, both


def measure(name: str) -> dict[str, Any]:
    """A row."""
    shape = SHAPES[name]
    inputs, dy = make(shape)
    seq_idx = (torch.rand(shape[:2], device="cuda") < 0.005).int().cumsum(1).int()
    elements = shape[0] * shape[1] * shape[2]
    row: dict[str, Any] = {
        "shape": name,
        "size": shape,
        "floor": {"forward_ms": elements * 2 * 2 / BANDWIDTH, "backward_ms": elements * 2 * 3 / BANDWIDTH},
        "ours": both_passes_ms(*calls("cuda", inputs, dy, None)),
        "ours_with_seq_idx": both_passes_ms(*calls("cuda", inputs, dy, seq_idx)),
        "causal_conv1d": None,
    }
    found, again = (calls("cuda", inputs, dy, seq_idx)[1]() for _ in range(2))
    row["bit_equal"] = all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    exact = calls("reference", [t.detach().float().requires_grad_() for t in inputs], dy.float(), seq_idx)[1]()
    row["errors"] = {k: ((a.float() - b).norm() / b.norm()).item() for k, a, b in zip(NAMES, found, exact, strict=True)}
    try:
        import causal_conv1d  # noqa: F401
    except ImportError as missing:
        return {**row, "why": str(missing)}
    row["causal_conv1d"] = both_passes_ms(*calls("causal_conv1d", inputs, dy, None))
    row["causal_conv1d_with_seq_idx"] = both_passes_ms(*calls("causal_conv1d", inputs, dy, seq_idx))
    row["speedup"] = {k: row["causal_conv1d"][f"{k}_ms"] / row["ours"][f"{k}_ms"] for k in ("forward", "backward", "both")}
    return row


def failures(rows: list[dict[str, Any]]) -> list[str]:
    """What is slower than causal-conv1d, wrong or not repeatable, in words."""
    failed = [f"{name}: not measured" for name in SHAPES if name not in {row["shape"] for row in rows}]
    for row in rows:
        speedup = row.get("speedup")
        if speedup is None:
            failed.append(f"{row['shape']}: not compared with causal-conv1d ({row.get('why', 'unknown')})")
        failed += [f"{row['shape']}: {k} is {v:.2f} times as fast as causal-conv1d's" for k, v in (speedup or {}).items() if v < 1]
        if not row["bit_equal"]:
            failed.append(f"{row['shape']}: two runs differ")
        for name, error in row["errors"].items():
            if not error <= LARGEST_ERROR[name]:
                failed.append(f"{row['shape']}: error of {name} is {error:.1e}, {LARGEST_ERROR[name]:.0e} allowed")
    return failed


def show(rows: list[dict[str, Any]]) -> None:
    """The table."""
    for row in rows:
        print(row["shape"], ", ".join(f"error of {k} {v:.1e}" for k, v in row["errors"].items()))
        for side in ("floor", "ours", "ours_with_seq_idx", "causal_conv1d", "causal_conv1d_with_seq_idx"):
            if row.get(side):
                print(f"    {side.replace('_', ' '):<28} forward {row[side]['forward_ms']:.3f} backward {row[side]['backward_ms']:.3f} ms")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit 1 under a bar; without a GPU reads the newest record")
    arguments = parser.parse_args()
    rows = rows_of("convolution", lambda: (measure(name) for name in SHAPES))
    show(rows)
    conclude(failures(rows) if arguments.check else [])


if __name__ == "__main__":
    main()
