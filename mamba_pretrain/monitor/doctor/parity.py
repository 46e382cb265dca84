"""Every implementation of every op against the reference on this device: values and gradients, at odd shapes, with document boundaries."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from mamba_pretrain.monitor.doctor.check import Check, green, grey, red
from mamba_pretrain.ops import registry

# Largest error allowed relative to the largest value, by compute dtype: rounding, with room for another order of summation.
TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 5e-2}
MEND = "set ops.require to another implementation of this op, and reinstall the package that provides this one"


def parity(device: torch.device) -> Iterator[Check]:
    """One line per implementation other than the reference."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    found = False
    for implementation in registry.implementations():
        if implementation.name == "reference":
            continue
        found = True
        yield _compare(implementation, device, dtype)
    slow = [op for op in CASES if device.type == "cuda" and not _has_fast(op, device, dtype)]
    if slow:
        mend = "pip install 'mamba-pretrain[cuda]' or '[kernels]', and see the kernel lines above"
        yield red("fast kernels", f"on this GPU only the slow reference can serve: {', '.join(slow)}", mend)
    if not found:
        yield grey("parity", "only reference implementations are registered")


def _has_fast(op: str, device: torch.device, dtype: torch.dtype) -> bool:
    request = registry.Request(arguments(op, device, dtype))
    candidates = registry.implementations(op)
    return any(i.unsupported(request) is None for i in candidates if not i.slow_on_cuda)


def _compare(implementation: registry.Implementation, device: torch.device, dtype: torch.dtype) -> Check:
    op, name = implementation.op, f"parity {implementation.op}: {implementation.name}"
    if op not in CASES:
        return grey(name, "no test case for this op")
    why = implementation.unsupported(registry.Request(arguments(op, device, dtype)))
    if why is not None:
        return grey(name, f"cannot serve here: {why}")
    expected, expected_gradients = _run(op, "reference", device, dtype)
    try:
        actual, gradients = _run(op, implementation.name, device, dtype)
    except Exception as error:
        return red(name, f"fails: {type(error).__name__}: {' '.join(str(error).split())[:200]}", MEND)
    worst = _error(actual, expected)
    if not worst <= TOLERANCE[dtype]:
        return red(name, f"its result differs from the reference by {worst:.1e} of the largest value", MEND)
    errors = {key: _error(gradients[key], expected_gradients[key]) for key in expected_gradients}
    key = max(errors, key=lambda k: errors[k] if errors[k] == errors[k] else float("inf"))
    if not errors[key] <= TOLERANCE[dtype]:
        return red(name, f"its gradient of {key} differs from the reference by {errors[key]:.1e} of the largest value", MEND)
    return green(name, f"forward {worst:.0e}, backward {errors[key]:.0e} of the largest value ({str(dtype).removeprefix('torch.')})")


def _run(op: str, name: str, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
    named = arguments(op, device, dtype)
    inputs = {key: value.requires_grad_() for key, value in named.items() if isinstance(value, Tensor) and value.is_floating_point()}
    with registry.using(**{op: name}):
        result = registry.call(op, **named)
    output = result[0] if isinstance(result, tuple) else result
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(output.shape, generator=generator).to(output.device)
    gradients = torch.autograd.grad((output.float() * weights).sum(), list(inputs.values()))
    return output.detach(), dict(zip(inputs, gradients, strict=True))


def _error(actual: Tensor, expected: Tensor) -> float:
    scale = expected.float().abs().max().clamp(min=1e-6)
    return float((actual.float() - expected.float()).abs().max() / scale)


# -- arguments: lengths that are no multiple of any chunk, documents of uneven length

Make = Callable[[torch.Generator], dict[str, Any]]
BATCH, LENGTH = 2, 333


def arguments(op: str, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """The op's arguments, the same values at every call."""
    made = CASES[op](torch.Generator().manual_seed(0))
    fp32 = FP32[op]
    return {
        k: v.to(device, dtype if v.is_floating_point() and k not in fp32 else v.dtype) if isinstance(v, Tensor) else v
        for k, v in made.items()
    }


def _documents() -> Tensor:
    index = torch.arange(LENGTH)
    return torch.stack([(index >= 100).int() + (index >= 229).int(), (index >= 7).int()])


def _scan(g: torch.Generator) -> dict[str, Any]:
    d, n = 192, 16
    wide = {name: torch.randn(BATCH, LENGTH, d, generator=g) for name in ("u", "delta", "z")}
    A = -torch.rand(d, n, generator=g) * 4 - 0.1
    B, C = (torch.randn(BATCH, LENGTH, n, generator=g) for _ in range(2))
    named = {"u": wide["u"], "delta": wide["delta"], "A": A, "B": B, "C": C, "D": torch.randn(d, generator=g), "z": wide["z"]}
    return {
        **named,
        "delta_bias": torch.randn(d, generator=g) - 3,
        "seq_idx": _documents(),
        "initial_state": None,
        "return_final_state": False,
    }


def _ssd(g: torch.Generator) -> dict[str, Any]:
    h, p, n = 8, 64, 64
    x = torch.randn(BATCH, LENGTH, h, p, generator=g)
    dt = torch.randn(BATCH, LENGTH, h, generator=g)
    A = -torch.rand(h, generator=g) * 4 - 0.1
    B, C = (torch.randn(BATCH, LENGTH, 1, n, generator=g) for _ in range(2))
    named = {
        "x": x,
        "dt": dt,
        "A": A,
        "B": B,
        "C": C,
        "D": torch.randn(h, generator=g),
        "z": None,
        "dt_bias": torch.randn(h, generator=g) - 3,
    }
    rest = {"seq_idx": _documents(), "initial_state": None, "return_final_state": False, "chunk_size": 64, "dt_limit": (0.0, float("inf"))}
    return {**named, **rest}


def _conv(g: torch.Generator) -> dict[str, Any]:
    x, weight = torch.randn(BATCH, LENGTH, 192, generator=g), torch.randn(192, 4, generator=g)
    bias = torch.randn(192, generator=g)
    rest = {"seq_idx": _documents(), "initial_state": None, "return_final_state": False}
    return {"x": x, "weight": weight, "bias": bias, "activation": "silu", **rest}


def _norm(g: torch.Generator) -> dict[str, Any]:
    x, residual = (torch.randn(BATCH, LENGTH, 192, generator=g) for _ in range(2))
    return {"x": x, "weight": torch.rand(192, generator=g) + 0.5, "eps": 1e-5, "residual": residual}


def _gated(g: torch.Generator) -> dict[str, Any]:
    x, z = (torch.randn(BATCH, LENGTH, 192, generator=g) for _ in range(2))
    return {"x": x, "z": z, "weight": torch.rand(192, generator=g) + 0.5, "eps": 1e-5, "group_size": 96}


def _loss(g: torch.Generator) -> dict[str, Any]:
    hidden, weight = torch.randn(BATCH, LENGTH, 64, generator=g), torch.randn(520, 64, generator=g) * 0.1
    labels = torch.randint(0, 500, (BATCH, LENGTH), generator=g)
    labels[:, ::7] = -100
    return {"hidden": hidden, "weight": weight, "labels": labels, "ignore_index": -100, "valid_vocab": 500}


CASES: dict[str, Make] = {
    "selective_scan": _scan,
    "ssd_scan": _ssd,
    "causal_conv1d": _conv,
    "rms_norm": _norm,
    "gated_rms_norm": _gated,
    "linear_cross_entropy": _loss,
}
# Arguments that stay fp32 whatever the compute dtype.
FP32: dict[str, tuple[str, ...]] = {
    "selective_scan": ("A", "D", "delta_bias"),
    "ssd_scan": ("A", "D", "dt_bias"),
    "causal_conv1d": (),
    "rms_norm": ("weight", "residual"),
    "gated_rms_norm": ("weight",),
    "linear_cross_entropy": (),
}
