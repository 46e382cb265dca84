"""Projections against torch.nn.Linear with autograd's splits and sums, forward and backward, in one run.

    python benchmarks/projection.py            # measures and records; needs a GPU
    python benchmarks/projection.py --check    # exit code 1 under a bar; without a GPU reads the newest record

fp32 weights under bf16 autocast, at the shapes of a micro-batch's projections; medians of repeated runs. Peak memory is that of a
forward and a backward pass beyond the operands. Errors are those of the gradients against fp32 matmuls without TF32, in the 2-norm.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent))
from record import conclude, rows_of

TOKENS = (8, 2048)
SLOWEST = 1.02  # of torch.nn.Linear's time: no projection may lose by more than noise
LARGEST_ERROR = 1.5  # of torch.nn.Linear's: a sum of parts is rounded to bf16 once a part

Function = Callable[[Tensor, Tensor], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Case:
    """A projection from ``inputs`` channels to outputs used in parts of ``widths``, whose input is used ``beside`` it or not."""

    inputs: int
    widths: tuple[int, ...]
    beside: bool = False

    def ours(self) -> Function:
        """Our op."""
        from mamba_pretrain.ops.projection import project, project_beside, project_parts

        if self.beside:
            return project_beside
        if len(self.widths) > 1:
            return lambda x, weight: project_parts(x, weight, None, self.widths)
        return lambda x, weight: (project(x, weight),)

    def linear(self) -> Function:
        """PyTorch's."""
        if self.beside:
            return lambda x, weight: (x, F.linear(x, weight))
        return lambda x, weight: F.linear(x, weight).split(self.widths, dim=-1)


CASES = {
    "Mamba-1 370m in_proj": Case(1024, (2048, 2048)),
    "Mamba-1 370m x_proj": Case(2048, (64 + 32,), beside=True),
    "Mamba-1 370m dt_proj": Case(64, (2048,)),
    "Mamba-1 370m out_proj": Case(2048, (1024,)),
    "Mamba-1 1.4b in_proj": Case(2048, (4096, 4096)),
    "Mamba-1 1.4b x_proj": Case(4096, (128 + 32,), beside=True),
    "Mamba-1 1.4b out_proj": Case(4096, (2048,)),
    "Mamba-2 370m in_proj": Case(1024, (2048, 2048 + 256, 32)),
    "Mamba-2 1.3b in_proj": Case(2048, (4096, 4096 + 256, 64)),
}


def operands(case: Case) -> tuple[Tensor, Tensor, list[Tensor]]:
    """x bf16, weight fp32, and bf16 gradients of the outputs."""
    torch.manual_seed(0)
    x = torch.randn(*TOKENS, case.inputs, device="cuda", dtype=torch.bfloat16).requires_grad_()
    weight = (torch.randn(sum(case.widths), case.inputs, device="cuda") * case.inputs**-0.5).requires_grad_()
    widths = (case.inputs, *case.widths) if case.beside else case.widths
    return x, weight, [torch.randn(*TOKENS, width, device="cuda", dtype=torch.bfloat16) for width in widths]


def step(function: Function, x: Tensor, weight: Tensor, given: list[Tensor]) -> tuple[Tensor, ...]:
    """Gradients of x and of the weight."""
    with torch.autocast("cuda", dtype=torch.bfloat16):
        outputs = function(x, weight)
    return torch.autograd.grad(outputs, (x, weight), given)


def measure_one(function: Function, case: Case) -> dict[str, Any]:
    """Errors, then peak memory, then time: the gradient of x itself is overwritten, and grows from run to run."""
    from triton.testing import do_bench

    x, weight, given = operands(case)
    whole = [t.detach().float().requires_grad_() for t in (x, weight)]
    exact = torch.autograd.grad(case.linear()(*whole), whole, [g.float() for g in given])
    found = step(function, x, weight, [g.clone() for g in given])
    errors = {name: ((a.float() - b).norm() / b.norm()).item() for name, a, b in zip(("dx", "dweight"), found, exact, strict=True)}
    del whole, exact, found
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(function, x, weight, given)
    peak = (torch.cuda.max_memory_allocated() - before) / 1e9
    milliseconds = float(do_bench(lambda: step(function, x, weight, given), warmup=20, rep=100, return_mode="median"))
    return {"both_ms": milliseconds, "memory_gb": peak, "errors": errors}


def measure(name: str, case: Case) -> dict[str, Any]:
    """A row."""
    row: dict[str, Any] = {"shape": name, "linear": measure_one(case.linear(), case), "ours": measure_one(case.ours(), case)}
    return row | {"speedup": row["linear"]["both_ms"] / row["ours"]["both_ms"]}


def failures(rows: list[dict[str, Any]]) -> list[str]:
    """What is slower, larger or less exact than torch.nn.Linear."""
    failed = []
    for row in rows:
        ours, linear = row["ours"], row["linear"]
        if ours["both_ms"] > SLOWEST * linear["both_ms"]:
            failed.append(f"{row['shape']}: slower than torch.nn.Linear")
        if ours["memory_gb"] > linear["memory_gb"] + 1e-3:
            failed.append(f"{row['shape']}: needs more memory than torch.nn.Linear")
        for name, error in ours["errors"].items():
            if error > LARGEST_ERROR * linear["errors"][name]:
                failed.append(f"{row['shape']}: the error of {name} is {error:.1e}, torch.nn.Linear's {linear['errors'][name]:.1e}")
    return failed


def show(rows: list[dict[str, Any]]) -> None:
    """The table."""
    for row in rows:
        ours, linear = row["ours"], row["linear"]
        errors = ", ".join(f"{name} {error:.1e} ({linear['errors'][name]:.1e})" for name, error in ours["errors"].items())
        print(
            f"{row['shape']:<24} {ours['both_ms']:.3f} ms, torch.nn.Linear {linear['both_ms']:.3f} ms: {row['speedup']:.2f}x; "
            f"peak {ours['memory_gb']:.3f} GB ({linear['memory_gb']:.3f}); errors {errors}"
        )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit 1 under a bar; without a GPU reads the newest record")
    arguments = parser.parse_args()
    rows = rows_of("projection", lambda: (measure(name, case) for name, case in CASES.items()))
    show(rows)
    conclude(failures(rows) if arguments.check else [])


if __name__ == "__main__":
    main()
