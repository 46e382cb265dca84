"""Time that Python needs for a call of each op, forward and backward pass, when the device costs nothing.

    python benchmarks/host_overhead.py             # measures and records
    python benchmarks/host_overhead.py --check     # measures; exit code 1 if calling kernels directly does not pay

Tiny tensors, one thread's processor time, the least of many repetitions; microseconds. On a GPU the kernels are real and shorter than their
launches. On a CPU the GPU's own code runs with kernels (Triton's and matmuls too) that do nothing, so that what is counted is Python and
PyTorch alone, without Triton's and cuBLAS's own launch.

``direct`` is how eager training calls the kernels, ``operators`` the way through PyTorch's dispatcher that it took before and that compilers and
FLOP counters still take.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from record import conclude, device_name, record

from mamba_pretrain.models.block import Block
from mamba_pretrain.models.boundaries import Boundaries
from mamba_pretrain.models.config import ModelConfig
from mamba_pretrain.ops import cuda_conv, cuda_conv_kernels, cuda_scan, cuda_scan_kernels, kernel_arguments, nvrtc, operator, registry
from mamba_pretrain.ops.causal_conv1d import causal_conv1d
from mamba_pretrain.ops.cross_entropy import linear_cross_entropy
from mamba_pretrain.ops.projection import project, project_parts
from mamba_pretrain.ops.rms_norm import gated_rms_norm, rms_norm
from mamba_pretrain.ops.selective_scan import selective_scan
from mamba_pretrain.ops.ssd_scan import ssd_scan

ROWS, LENGTH, WIDTH, STATES, LAYERS = 1, 16, 64, 16, 8
REPETITIONS, CALLS = 30, 10
LARGEST_SHARE = 0.8  # of the time through the dispatcher

SERVING = {
    "selective_scan": "cuda",
    "causal_conv1d": "cuda",
    "ssd_scan": "triton",
    "rms_norm": "triton",
    "gated_rms_norm": "triton",
    "linear_cross_entropy": "triton",
}
TRITON = {
    "triton_norm_kernels": ("rms_forward", "rms_backward", "gated_forward", "gated_backward", "sum_parts"),
    "triton_ssd_kernels": ("ssd_prepare", "ssd_forward", "ssd_states"),
    "triton_ssd_backward_kernels": ("ssd_inside", "ssd_edges", "ssd_gather", "ssd_finish"),
    "triton_cross_entropy_kernels": ("softmax_gradient",),
}


# -- kernels that do nothing, for a machine without a GPU -----------------------------------------------------------------------------------


class _NoKernel:
    """A Triton kernel that is never launched, and what Triton compiles of it."""

    arg_names: tuple[str, ...] = ()

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        return lambda *arguments, **options: self


def _always(*arguments: Any) -> bool:
    return True


def _no_matmul(a: Tensor, b: Tensor, out_dtype: Any = None, out: Tensor | None = None) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1]) if out is None else out


@contextlib.contextmanager
def null_kernels() -> Iterator[None]:
    """Inside, the code for GPUs runs on CPU tensors and launches nothing."""
    kernel = nvrtc.Kernel(0, 128, 0, 0, lambda *arguments: (0,))
    shape = cuda_scan_kernels.Shape(2, 4, 1, 8, 1, 1)
    patches = [
        mock.patch.object(nvrtc, "kernel", return_value=kernel),
        mock.patch.object(nvrtc, "_current_stream", int),
        mock.patch.object(cuda_scan_kernels, "shape", functools.cache(lambda *arguments: shape)),
        mock.patch.object(cuda_conv_kernels, "tuning", functools.cache(lambda name, *others: cuda_conv_kernels.PORTABLE[name])),
        mock.patch.object(torch, "mm", _no_matmul),
        mock.patch.object(torch, "addmm", lambda total, a, b, out_dtype=None, out=None: total),
        mock.patch.dict(registry._implementations),
    ]
    for module, kernels in TRITON.items():
        fake = mock.NonCallableMock(spec=kernels, **{name: _NoKernel() for name in kernels})
        patches += [mock.patch.dict(sys.modules, {f"mamba_pretrain.ops.{module}": fake})]
        patches += [mock.patch(f"mamba_pretrain.ops.{module}", fake, create=True)]
    for module in (cuda_conv, cuda_scan):
        for one in (module.forward, module.backward):
            one._definition.register_kernel("cpu")(one._function)
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        for op, name in SERVING.items():
            serving = registry._implementations[op][name]
            registry.register(op, name, priority=1000)(serving.function)
        yield


# -- cases ----------------------------------------------------------------------------------------------------------------------------------


def cases(device: str) -> dict[str, Callable[[], Any]]:
    """What is measured, by name: each runs both passes once."""

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, device=device).to(dtype).requires_grad_()

    low = functools.partial(new, dtype=torch.bfloat16)
    x, z, residual = low(ROWS, LENGTH, WIDTH), low(ROWS, LENGTH, WIDTH), new(ROWS, LENGTH, WIDTH)
    B, C = low(ROWS, LENGTH, STATES), low(ROWS, LENGTH, STATES)
    A = (-torch.rand(WIDTH, STATES, device=device)).requires_grad_()
    taps, weight, bias, square, wide = new(WIDTH, 4), new(WIDTH), new(WIDTH), new(WIDTH, WIDTH), new(2 * WIDTH, WIDTH)
    heads, steps, per_head = low(ROWS, LENGTH, 4, 16), low(ROWS, LENGTH, 4), (-torch.rand(4, device=device)).requires_grad_()
    groups = low(ROWS, LENGTH, 1, STATES), low(ROWS, LENGTH, 1, STATES)
    documents = torch.zeros(ROWS, LENGTH, dtype=torch.int32, device=device)
    labels = torch.zeros(ROWS, LENGTH, dtype=torch.int64, device=device)

    def both(function: Callable[..., Any], *inputs: Tensor) -> Callable[[], Any]:
        def run() -> Any:
            with torch.autocast(device, dtype=torch.bfloat16):
                outputs = function(*inputs)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            given = [gradients.setdefault((t.shape, t.dtype), torch.ones_like(t)) for t in outputs]
            return torch.autograd.grad(outputs, inputs, given)

        gradients: dict[Any, Tensor] = {}
        return run

    return {
        "nothing": both(lambda x: x * 1, x),
        "rms_norm": both(lambda x, w, r: rms_norm(x, w, 1e-5, residual=r), x, weight, residual),
        "gated_rms_norm": both(lambda x, z, w: gated_rms_norm(x, z, w, 1e-5), x, z, weight),
        "causal_conv1d": both(lambda x, w, b: causal_conv1d(x, w, b, seq_idx=documents), x, taps, bias),
        "selective_scan": both(
            lambda u, dt, A, B, C, D, z, bias: selective_scan(u, dt, A, B, C, D, z, bias, documents), x, z, A, B, C, weight, z, bias
        ),
        "project": both(project, x, square),
        "project_parts": both(lambda x, w: project_parts(x, w, None, (WIDTH, WIDTH)), x, wide),
        "linear_cross_entropy": both(lambda x, w: linear_cross_entropy(x, w, labels), x, square),
        "ssd_scan": both(
            lambda x, dt, A, B, C, D, bias: ssd_scan(x, dt, A, B, C, D, None, bias, documents),
            heads,
            steps,
            per_head,
            *groups,
            per_head,
            per_head,
        ),
        "Mamba-1 layer": layers(device, documents, "mamba1"),
        "Mamba-2 layer": layers(device, documents, "mamba2"),
    }


def layers(device: str, documents: Tensor, mixer: str) -> Callable[[], Any]:
    """A stack of blocks, both passes."""
    config = ModelConfig(vocab_size=64, d_model=WIDTH, n_layer=LAYERS, d_state=STATES, headdim=16, mixer=mixer)
    blocks = torch.nn.ModuleList(Block(config, mixer) for _ in range(LAYERS)).to(device)
    parameters = list(blocks.parameters())
    for parameter in parameters:
        torch.nn.init.uniform_(parameter, -0.1, 0.1)
    x = torch.randn(ROWS, LENGTH, WIDTH, device=device).bfloat16().requires_grad_()
    boundaries = Boundaries(documents, torch.arange(LENGTH, device=device)[None])
    given = torch.ones(x.shape, dtype=torch.bfloat16, device=device), torch.ones(x.shape, device=device)

    def run() -> None:
        hidden, residual = x, None
        with torch.autocast(device, dtype=torch.bfloat16):
            for block in blocks:
                hidden, residual = block(hidden, residual, boundaries)
        torch.autograd.backward((hidden, residual), given)
        for parameter in parameters:
            parameter.grad = None

    return run


# -- measurement ----------------------------------------------------------------------------------------------------------------------------


def microseconds(run: Callable[[], Any], device: str) -> float:
    """Of one call. On a GPU by the clock, since its backward pass has a thread of its own; on a CPU this thread's own time."""
    clock = time.perf_counter if device == "cuda" else time.thread_time
    for _ in range(5):
        run()
    least = float("inf")
    for _ in range(REPETITIONS):
        if device == "cuda":
            torch.cuda.synchronize()
        begun = clock()
        for _ in range(CALLS):
            run()
        least = min(least, (clock() - begun) / CALLS)
    return least * 1e6


def launch_microseconds() -> float:
    """A launch alone: the backward scan's argument of 35 fields, and the call of a driver that does nothing."""
    t, params = torch.empty(1, 1, 1), cuda_scan_kernels.BackwardParams
    kernel = nvrtc.Kernel(0, 128, 0, 0, lambda *arguments: (0,))

    def run() -> None:
        rows = map(kernel_arguments.rows, (t,) * 6)
        kernel((1, 1, 1), params(*rows, *map(kernel_arguments.pointer, (t,) * 14), 1, 1, 1, 1))

    with mock.patch.object(nvrtc, "_current_stream", int):
        return microseconds(run, "cpu")


def measure(device: str) -> list[dict[str, Any]]:
    """Rows: an op's time both ways."""
    found = []
    for name, run in cases(device).items():
        each = LAYERS if name.endswith("layer") else 1
        direct = microseconds(run, device) / each
        with mock.patch.object(operator, "observed", _always):
            through = microseconds(run, device) / each
        found.append({"op": name, "direct_us": direct, "operators_us": through})
        print(f"{name:<22} {direct:7.1f} us, through the dispatcher {through:7.1f} us", flush=True)
    return found


def failures(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Ops of our own operators for which the direct call does not pay."""
    return [
        f"{row['op']}: {row['direct_us']:.0f} us where the dispatcher takes {row['operators_us']:.0f} us"
        for row in rows
        if row["op"] in {*SERVING, "Mamba-1 layer", "Mamba-2 layer"} - {"linear_cross_entropy"}
        and row["direct_us"] > LARGEST_SHARE * row["operators_us"]
    ]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit 1 under a bar; records nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    registry.implementations()
    print(f"{device_name()}, {'real kernels' if device == 'cuda' else 'kernels that do nothing'}")
    launch = launch_microseconds()
    print(f"{'launch of 35 fields':<22} {launch:7.1f} us")
    with null_kernels() if device == "cpu" else registry.using(**SERVING):
        rows = measure(device)
    if not arguments.check:
        print(record("host_overhead", {"kernels": "real" if device == "cuda" else "none", "launch_us": launch, "rows": rows}))
    conclude(failures(rows) if arguments.check else [])


if __name__ == "__main__":
    main()
