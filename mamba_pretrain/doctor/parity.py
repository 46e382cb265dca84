"""Every implementation of every op against the reference: values and gradients, and which of them a run would be served by."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from data_tools.errors import UserError
from mamba_pretrain.doctor.check import Begun, Check, from_error, green, grey, red, yellow
from mamba_pretrain.doctor.op_cases import CASES, STEPS, arguments
from mamba_pretrain.ops import registry
from mamba_pretrain.ops.config import OpsConfig

# Largest error allowed relative to the largest value, by compute dtype: rounding, with room for another order of summation.
TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 5e-2}
MEND = "set ops.require to another implementation of this op, and reinstall the package that provides this one"
INSTALL = "pip install 'mamba-pretrain[kernels]' (own kernels) or '[cuda]' (mamba-ssm), and see the kernel lines above"


def parity(device: torch.device, skip: int = 0) -> Iterator[Check | Begun]:
    """One line per implementation other than the references, but for the first ``skip``."""
    dtype = compute_dtype(device)
    others = [implementation for implementation in registry.implementations() if implementation.name != "reference"]
    for implementation in others[skip:]:
        yield Begun(f"parity {implementation.op}: {implementation.name}")
        yield _compare(implementation, device, dtype)


def compute_dtype(device: torch.device) -> torch.dtype:
    """What training computes in on this kind of device, unless told otherwise."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def serving(ops: Sequence[str] | None, config: OpsConfig, device: torch.device, isolate_documents: bool) -> Iterator[Check]:
    """What will compute each op of a run, as the resolver decides under its config. ``ops=None``: no run is known, so nothing fails."""
    registry.configure(config)
    for op in CASES if ops is None else ops:
        named = arguments(op, device, compute_dtype(device))
        if not isolate_documents and "seq_idx" in named:
            named["seq_idx"] = None
        try:
            chosen = registry.resolve(op, registry.Request(named))
        except UserError as error:
            failed = from_error(f"op {op}", error)
            yield failed if ops is not None else yellow(failed.name, f"models that need it cannot train here: {failed.detail}", INSTALL)
            continue
        if chosen.slow_on_cuda and device.type == "cuda":
            yield yellow(f"op {op}", f"{chosen.name}: slow on this GPU, allowed by ops.allow_slow", INSTALL)
        else:
            yield green(f"op {op}", chosen.name)


def _compare(implementation: registry.Implementation, device: torch.device, dtype: torch.dtype) -> Check:
    op, name = implementation.op, f"parity {implementation.op}: {implementation.name}"
    if op not in CASES:
        return grey(name, "no test case for this op")
    why = implementation.unsupported(registry.Request(arguments(op, device, dtype)))
    if why is not None:
        return grey(name, f"cannot serve here: {why}")
    expected, expected_gradients = _reference(op, dtype)
    try:
        actual, gradients = _run(op, implementation.name, device, dtype)
        worst, errors = _error(actual, expected), {key: _error(gradients[key], value) for key, value in expected_gradients.items()}
    except Exception as error:
        return red(name, f"fails: {type(error).__name__}: {' '.join(str(error).split())[:200]}", MEND)
    if not worst <= TOLERANCE[dtype]:
        return red(name, f"its result differs from the reference by {worst:.1e} of the largest value", MEND)
    if not errors:
        return green(name, f"{worst:.0e} of the largest value ({str(dtype).removeprefix('torch.')})")
    key = max(errors, key=lambda k: errors[k] if errors[k] == errors[k] else float("inf"))
    if not errors[key] <= TOLERANCE[dtype]:
        return red(name, f"its gradient of {key} differs from the reference by {errors[key]:.1e} of the largest value", MEND)
    return green(name, f"forward {worst:.0e}, backward {errors[key]:.0e} of the largest value ({str(dtype).removeprefix('torch.')})")


@functools.cache
def _reference(op: str, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
    """The reference's result, always on the CPU: its many small steps would take a GPU long, and it checks the GPU's own arithmetic too."""
    return _run(op, "reference", torch.device("cpu"), dtype)


def _run(op: str, name: str, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
    named = arguments(op, device, dtype)
    if op in STEPS:
        with torch.no_grad(), registry.using(**{op: name}):
            registry.call(op, **named)
            return registry.call(op, **named), {}  # the second token's result shows what the first left in the state
    inputs = {key: value.requires_grad_() for key, value in named.items() if isinstance(value, Tensor) and value.is_floating_point()}
    with registry.using(**{op: name}):
        result = registry.call(op, **named)
    output = result[0] if isinstance(result, tuple) else result
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(output.shape, generator=generator).to(output.device)
    gradients = torch.autograd.grad((output.float() * weights).sum(), list(inputs.values()))
    return output.detach(), dict(zip(inputs, gradients, strict=True))


def _error(actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.float().cpu(), expected.float()
    return float((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-6))
