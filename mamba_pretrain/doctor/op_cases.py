"""Arguments for every op, to try its implementations with: small, of odd lengths (no multiple of any chunk), with documents of uneven length."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

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


def _conv_step(g: torch.Generator) -> dict[str, Any]:
    x, weight, bias = torch.randn(BATCH, 192, generator=g), torch.randn(192, 4, generator=g), torch.randn(192, generator=g)
    return {"x": x, "weight": weight, "bias": bias, "state": torch.randn(BATCH, 3, 192, generator=g)}


def _selective_step(g: torch.Generator) -> dict[str, Any]:
    d, n, r = 192, 16, 12
    u, z, dt = (torch.randn(BATCH, width, generator=g) for width in (d, d, r))
    B, C = (torch.randn(BATCH, n, generator=g) for _ in range(2))
    named = {"u": u, "dt": dt, "dt_weight": torch.randn(d, r, generator=g), "A_log": torch.rand(d, n, generator=g), "B": B, "C": C}
    named |= {"D": torch.randn(d, generator=g), "z": z, "dt_bias": torch.randn(d, generator=g) - 3}
    return named | {"state": torch.randn(BATCH, d, n, generator=g)}


def _ssd_step(g: torch.Generator) -> dict[str, Any]:
    h, p, n = 8, 64, 64
    x, dt = torch.randn(BATCH, h, p, generator=g), torch.randn(BATCH, h, generator=g)
    B, C = (torch.randn(BATCH, 1, n, generator=g) for _ in range(2))
    named = {"x": x, "dt": dt, "A_log": torch.rand(h, generator=g), "B": B, "C": C, "D": torch.randn(h, generator=g)}
    named |= {"dt_bias": torch.randn(h, generator=g) - 3, "state": torch.randn(BATCH, h, p, n, generator=g)}
    return {**named, "dt_limit": (0.0, float("inf"))}


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
    "conv_step": _conv_step,
    "selective_step": _selective_step,
    "ssd_step": _ssd_step,
}
# Generation's, without gradients; they change their argument `state`.
STEPS = ("conv_step", "selective_step", "ssd_step")
# Arguments that stay fp32 whatever the compute dtype.
FP32: dict[str, tuple[str, ...]] = {
    "selective_scan": ("A", "D", "delta_bias"),
    "ssd_scan": ("A", "D", "dt_bias"),
    "causal_conv1d": (),
    "rms_norm": ("weight", "residual"),
    "gated_rms_norm": ("weight",),
    "linear_cross_entropy": (),
    "conv_step": (),
    "selective_step": ("A_log", "D", "dt_bias", "state"),
    "ssd_step": ("A_log", "D", "dt_bias", "state"),
}
