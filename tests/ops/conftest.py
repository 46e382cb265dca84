"""Oracles and adversarial cases that every implementation of a scan runs against.

A test that takes ``selective_scan_case``, ``ssd_scan_case`` or ``conv_case`` (or ``short_...``) runs once per case of the table;
``check_selective_scan(case, implementation, device, dtype)`` and its siblings compare values and every gradient with a sequential fp64
oracle. So a new implementation is covered by::

    @pytest.mark.gpu
    def test_cases(selective_scan_case, check_selective_scan):
        check_selective_scan(selective_scan_case, "cuda", device="cuda", dtype=torch.bfloat16, channels=64, state=16)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mamba_pretrain.ops import registry
from mamba_pretrain.ops.causal_conv1d import causal_conv1d
from mamba_pretrain.ops.selective_scan import selective_scan
from mamba_pretrain.ops.ssd_scan import ssd_scan

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


@dataclass(frozen=True)
class ScanCase:
    """One adversarial input. ``delta``: (mean, spread) of the step size before the softplus; ``decay``: range of -A, log-uniform.

    ``starts``: "none", "every", "random", "repeat" (numbers 0, 1, 0, 1, ...) or a tuple of positions at which documents begin.
    """

    length: int
    delta: tuple[float, float] = (-2.0, 1.0)
    decay: tuple[float, float] = (0.5, 16.0)
    starts: str | tuple[int, ...] = "none"
    initial: bool = True
    final: bool = True
    optional: bool = True
    options: dict[str, Any] = field(default_factory=dict)


SCAN_CASES = {
    "one-step": ScanCase(1),
    "one-step-alone": ScanCase(1, initial=False, final=False),
    "two-steps": ScanCase(2, starts=(1,)),
    "three-steps": ScanCase(3),
    "under-a-chunk": ScanCase(15),
    "a-chunk": ScanCase(16, starts=(8,)),
    "over-a-chunk": ScanCase(17),
    "under-64": ScanCase(63, starts="random"),
    "exactly-64": ScanCase(64),
    "over-64": ScanCase(65, starts=(64,)),
    "odd-length": ScanCase(101, starts="random"),
    "starts-at-chunk-edges": ScanCase(96, starts=(8, 16, 32, 64)),
    "starts-beside-chunk-edges": ScanCase(96, starts=(7, 9, 15, 17, 31, 33, 63, 65)),
    "starts-everywhere": ScanCase(40, starts="every"),
    "repeated-numbers": ScanCase(70, starts="repeat"),
    "start-at-the-end": ScanCase(66, starts=(65,)),
    "no-initial-state": ScanCase(80, initial=False, starts="random"),
    "no-final-state": ScanCase(80, final=False, starts="random"),
    "only-what-is-required": ScanCase(50, initial=False, final=False, optional=False),
    "tiny-steps": ScanCase(90, delta=(-12.0, 1.0)),
    "huge-steps": ScanCase(90, delta=(8.0, 4.0), starts="random"),
    "steps-of-all-sizes": ScanCase(90, delta=(0.0, 8.0), starts="random"),
    "hardly-any-decay": ScanCase(90, decay=(1e-8, 1e-4)),
    "complete-decay": ScanCase(90, decay=(1e3, 1e5)),
    "decays-of-all-sizes": ScanCase(150, decay=(1e-5, 1e4), delta=(0.0, 4.0), starts="random"),
    "over-a-segment": ScanCase(2051, starts=(1000, 2048), delta=(-4.0, 1.0)),
}

SSD_CASES = {
    **SCAN_CASES,
    "limited-steps": ScanCase(90, delta=(-2.0, 2.0), options={"dt_limit": (0.05, 0.4)}),
    "small-chunks": ScanCase(90, starts="random", options={"chunk_size": 16}),
    "large-chunks": ScanCase(300, starts=(256,), options={"chunk_size": 128}),
}

CONV_CASES = {
    "one-step": ScanCase(1),
    "two-steps": ScanCase(2, starts=(1,)),
    "three-steps": ScanCase(3),
    "four-steps-alone": ScanCase(4, initial=False, final=False),
    "starts-everywhere": ScanCase(20, starts="every"),
    "close-starts": ScanCase(20, starts=(2, 3, 5, 9, 19)),
    "repeated-numbers": ScanCase(20, starts="repeat"),
    "odd-length": ScanCase(131, starts="random"),
    "no-initial-state": ScanCase(60, initial=False, starts="random"),
    "no-bias-no-activation": ScanCase(33, optional=False),
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Runs a test once per case of the table that it names."""
    for name, table in (("selective_scan_case", SCAN_CASES), ("ssd_scan_case", SSD_CASES), ("conv_case", CONV_CASES)):
        short = {key: case for key, case in table.items() if case.length <= 200}
        for fixture, cases in ((name, table), (f"short_{name}", short)):
            if fixture in metafunc.fixturenames:
                metafunc.parametrize(fixture, cases.values(), ids=cases.keys())


@pytest.fixture
def ssd_cases() -> dict[str, ScanCase]:
    """The table, for a test that needs some of it."""
    return SSD_CASES


def make_seq_idx(case: ScanCase, batch: int) -> Tensor | None:
    """(batch, length) int32, another draw for every row where it is random."""
    length = case.length
    if case.starts == "none":
        return None
    if case.starts == "every":
        return torch.arange(length, dtype=torch.int32).repeat(batch, 1)
    if case.starts == "repeat":
        return (torch.arange(length, dtype=torch.int32) // 3 % 2).repeat(batch, 1)
    begins = torch.rand(batch, length) < 0.08
    if isinstance(case.starts, tuple):
        begins = torch.zeros(batch, length, dtype=torch.bool)
        begins[:, list(case.starts)] = True
    return begins.cumsum(1, dtype=torch.int32) + 3


def log_uniform(shape: tuple[int, ...], low: float, high: float) -> Tensor:
    """Uniform in the logarithm."""
    return torch.exp(torch.empty(shape).uniform_(torch.log(torch.tensor(low)).item(), torch.log(torch.tensor(high)).item()))


def begins(seq_idx: Tensor | None, t: int) -> Tensor | None:
    """(batch,) fp64: 0 where a document begins at step t, else 1."""
    return None if seq_idx is None or t == 0 else (seq_idx[:, t] == seq_idx[:, t - 1]).double()


# -- oracles: one step at a time, fp64 --------------------------------------------------------------------------------------------------------


def selective_scan_oracle(t: dict[str, Tensor | None], seq_idx: Tensor | None, case: ScanCase) -> tuple[Tensor, Tensor]:
    """The recurrence as the paper writes it."""
    u, A, B, C = t["u"], t["A"], t["B"], t["C"]
    delta = t["delta"] if t["delta_bias"] is None else t["delta"] + t["delta_bias"]
    delta = F.softplus(delta, threshold=1e4)
    state = t["initial_state"]
    if state is None:
        state = u.new_zeros(u.shape[0], *A.shape)
    steps = []
    for i in range(u.shape[1]):
        keep = begins(seq_idx, i)
        before = state if keep is None else state * keep[:, None, None]
        state = torch.exp(delta[:, i, :, None] * A) * before + (delta[:, i] * u[:, i])[..., None] * B[:, i, None, :]
        steps.append((state * C[:, i, None, :]).sum(-1))
    y = torch.stack(steps, 1)
    y = y if t["D"] is None else y + t["D"] * u
    return y if t["z"] is None else y * F.silu(t["z"]), state


def ssd_scan_oracle(t: dict[str, Tensor | None], seq_idx: Tensor | None, case: ScanCase) -> tuple[Tensor, Tensor]:
    """The same with one decay a head."""
    x, A = t["x"], t["A"]
    heads = x.shape[2]
    B, C = (t[name].repeat_interleave(heads // t[name].shape[2], dim=2) for name in "BC")
    dt = t["dt"] if t["dt_bias"] is None else t["dt"] + t["dt_bias"]
    dt = F.softplus(dt, threshold=1e4).clamp(*case.options.get("dt_limit", (0.0, float("inf"))))
    state = t["initial_state"]
    if state is None:
        state = x.new_zeros(x.shape[0], heads, x.shape[3], B.shape[3])
    steps = []
    for i in range(x.shape[1]):
        keep = begins(seq_idx, i)
        before = state if keep is None else state * keep[:, None, None, None]
        added = (dt[:, i, :, None] * x[:, i])[..., None] * B[:, i, :, None, :]
        state = torch.exp(dt[:, i] * A)[..., None, None] * before + added
        steps.append((state * C[:, i, :, None, :]).sum(-1))
    y = torch.stack(steps, 1)
    y = y if t["D"] is None else y + t["D"][:, None] * x
    return y if t["z"] is None else y * F.silu(t["z"]), state


def conv_oracle(t: dict[str, Tensor | None], seq_idx: Tensor | None, case: ScanCase) -> tuple[Tensor, Tensor]:
    """Every tap of every step by itself."""
    x, weight = t["x"], t["weight"]
    reach = weight.shape[1] - 1
    before = x.new_zeros(x.shape[0], reach, x.shape[2]) if t["initial_state"] is None else t["initial_state"]
    padded = torch.cat([before, x], 1)
    zero = torch.zeros(x.shape[0], 1, dtype=torch.int64)
    document = torch.zeros(x.shape[:2], dtype=torch.int64)
    if seq_idx is not None:
        document = torch.cat([zero, (seq_idx[:, 1:] != seq_idx[:, :-1]).cumsum(1)], 1)
    document = torch.cat([zero.expand(-1, reach), document], 1)
    steps = []
    for i in range(x.shape[1]):
        taps = [
            weight[:, k] * padded[:, i + k] * (document[:, i + k] == document[:, i + reach]).double()[:, None] for k in range(reach + 1)
        ]
        steps.append(sum(taps))
    y = torch.stack(steps, 1)
    y = y if t["bias"] is None else y + t["bias"]
    final = padded[:, x.shape[1] :] * (document[:, x.shape[1] :] == document[:, -1:]).double()[..., None]
    return F.silu(y) if case.optional else y, final


# -- comparison -------------------------------------------------------------------------------------------------------------------------------


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected magnitude."""
    scale = expected.abs().max().item() if expected.numel() else 0.0
    return (found.double().cpu() - expected).abs().max().item() / (scale + 1e-30) if expected.numel() else 0.0


def compare(
    op: Callable[..., Any],
    oracle: Callable[..., tuple[Tensor, Tensor]],
    tensors: dict[str, Tensor | None],
    case: ScanCase,
    implementation: str,
    device: str,
    tolerance: float,
    final_gradient: bool,
) -> None:
    """Values and gradients of every input, against the oracle on the same (rounded) numbers."""
    batch = next(t for t in tensors.values() if t is not None).shape[0]
    seq_idx = make_seq_idx(case, batch)
    ours = {k: None if t is None else t.detach().to(device).requires_grad_() for k, t in tensors.items()}
    exact = {k: None if t is None else t.detach().double().requires_grad_() for k, t in tensors.items()}
    with registry.using(**{op.__name__: implementation}):
        found = op(**ours, seq_idx=None if seq_idx is None else seq_idx.to(device), return_final_state=case.final, **case.options)
    found = found if case.final else (found,)
    expected = oracle(exact, seq_idx, case)[: len(found)]
    upstream = [torch.randn(t.shape) for t in found]
    if not final_gradient:
        upstream = upstream[:1]
    names = [k for k, t in ours.items() if t is not None]
    loss = sum((t.float() * g.to(device)).sum() for t, g in zip(found, upstream, strict=False))
    exact_loss = sum((t * g.double()).sum() for t, g in zip(expected, upstream, strict=False))
    gradients = torch.autograd.grad(loss, [ours[k] for k in names], allow_unused=True)
    exact_gradients = torch.autograd.grad(exact_loss, [exact[k] for k in names], allow_unused=True)
    errors = {f"output {i}": relative_error(a, b) for i, (a, b) in enumerate(zip(found, expected, strict=True))}
    for name, a, b in zip(names, gradients, exact_gradients, strict=True):
        zero = torch.zeros_like(exact[name])
        errors[f"d{name}"] = relative_error(zero if a is None else a, zero if b is None else b)
        assert a is None or (a.dtype == ours[name].dtype and a.shape == ours[name].shape)
    assert found[0].dtype == next(iter(ours.values())).dtype
    too_large = {name: f"{error:.1e}" for name, error in errors.items() if not error <= tolerance}
    assert not too_large, too_large


def selective_scan_tensors(case: ScanCase, dtype: torch.dtype, batch: int, channels: int, state: int) -> dict[str, Tensor | None]:
    """Random operands; activations in ``dtype``, the rest fp32."""
    mean, spread = case.delta
    sequence = (batch, case.length, channels)

    def extra(t: Tensor) -> Tensor | None:
        return t if case.optional else None

    return {
        "u": torch.randn(sequence).to(dtype),
        "delta": (mean + spread * torch.randn(sequence)).to(dtype),
        "A": -log_uniform((channels, state), *case.decay),
        "B": torch.randn(batch, case.length, state).to(dtype),
        "C": torch.randn(batch, case.length, state).to(dtype),
        "D": extra(torch.randn(channels)),
        "z": extra(torch.randn(sequence).to(dtype)),
        "delta_bias": extra(0.3 * torch.randn(channels)),
        "initial_state": torch.randn(batch, channels, state) if case.initial else None,
    }


def ssd_scan_tensors(
    case: ScanCase, dtype: torch.dtype, batch: int, heads: int, headdim: int, groups: int, state: int, gated: bool
) -> dict[str, Tensor | None]:
    """Random operands; activations in ``dtype``, the rest fp32."""
    mean, spread = case.delta
    values, shared = (batch, case.length, heads, headdim), (batch, case.length, groups, state)
    return {
        "x": torch.randn(values).to(dtype),
        "dt": (mean + spread * torch.randn(batch, case.length, heads)).to(dtype),
        "A": -log_uniform((heads,), *case.decay),
        "B": torch.randn(shared).to(dtype),
        "C": torch.randn(shared).to(dtype),
        "D": torch.randn(heads) if case.optional else None,
        "z": torch.randn(values).to(dtype) if case.optional and gated else None,
        "dt_bias": 0.3 * torch.randn(heads) if case.optional else None,
        "initial_state": torch.randn(batch, heads, headdim, state) if case.initial else None,
    }


@pytest.fixture
def check_selective_scan() -> Callable[..., None]:
    """Compares an implementation with the oracle on a case; see the module."""

    def check(
        case: ScanCase,
        implementation: str,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        batch: int = 2,
        channels: int = 6,
        state: int = 4,
        tolerance: float | None = None,
        final_gradient: bool = True,
    ) -> None:
        torch.manual_seed(0)
        tensors = selective_scan_tensors(case, dtype, batch, channels, state)
        compare(selective_scan, selective_scan_oracle, tensors, case, implementation, device, tolerance or TOLERANCE[dtype], final_gradient)

    return check


@pytest.fixture
def check_ssd_scan() -> Callable[..., None]:
    """Compares an implementation with the oracle on a case; see the module."""

    def check(
        case: ScanCase,
        implementation: str,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        batch: int = 2,
        heads: int = 4,
        headdim: int = 3,
        groups: int = 2,
        state: int = 5,
        gated: bool = True,
        tolerance: float | None = None,
    ) -> None:
        torch.manual_seed(0)
        tensors = ssd_scan_tensors(case, dtype, batch, heads, headdim, groups, state, gated)
        compare(ssd_scan, ssd_scan_oracle, tensors, case, implementation, device, tolerance or TOLERANCE[dtype], True)

    return check


@pytest.fixture
def check_conv() -> Callable[..., None]:
    """Compares an implementation with the oracle on a case; see the module."""

    def check(
        case: ScanCase,
        implementation: str,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        batch: int = 2,
        channels: int = 6,
        taps: int = 4,
    ) -> None:
        torch.manual_seed(0)
        tensors = {
            "x": torch.randn(batch, case.length, channels).to(dtype),
            "weight": torch.randn(channels, taps),
            "bias": torch.randn(channels) if case.optional else None,
            "initial_state": torch.randn(batch, taps - 1, channels).to(dtype) if case.initial else None,
        }
        case = ScanCase(**{**vars(case), "options": {} if case.optional else {"activation": None}})
        compare(causal_conv1d, conv_oracle, tensors, case, implementation, device, TOLERANCE[dtype], True)

    return check


@pytest.fixture
def check_isolation() -> Callable[..., None]:
    """Changes all before a document begins and requires the outputs and gradients from there on to stay the same, to the bit."""

    def check(op: Callable[..., Tensor], sequences: dict[str, Tensor], shared: dict[str, Any], start: int, device: str = "cpu") -> None:
        length = next(iter(sequences.values())).shape[1]
        batch = next(iter(sequences.values())).shape[0]
        seq_idx = (torch.arange(length) >= start).int().repeat(batch, 1).to(device)

        def run(seed: int) -> list[Tensor]:
            generator = torch.Generator().manual_seed(seed)
            inputs = {}
            for name, tensor in sequences.items():
                tensor = tensor.clone()
                tensor[:, :start] = 3 * torch.randn(tensor[:, :start].shape, generator=generator)
                inputs[name] = tensor.to(device).requires_grad_()
            y = op(**inputs, **shared, seq_idx=seq_idx)
            upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(7))
            upstream[:, :start] = torch.randn(upstream[:, :start].shape, generator=generator)
            gradients = torch.autograd.grad(y, list(inputs.values()), upstream.to(device, y.dtype))
            return [t[:, start:].detach().cpu() for t in (y, *gradients)]

        for name, a, b in zip(["y", *sequences], run(1), run(2), strict=True):
            assert torch.equal(a, b), name

    return check


@pytest.fixture
def check_threads() -> Iterator[Callable[..., None]]:
    """Requires outputs and gradients of an op's C kernel to be the same on one thread and on three, to the bit."""
    before = torch.get_num_threads()

    def check(op: Callable[..., Tensor], inputs: dict[str, Tensor], **options: Any) -> None:
        def outcome(threads: int) -> list[Tensor]:
            torch.set_num_threads(threads)
            leaves = {name: t.detach().requires_grad_() for name, t in inputs.items()}
            with registry.using(**{op.__name__: "c"}):
                y = op(**leaves, **options)
            return [y, *torch.autograd.grad(y.square().sum(), list(leaves.values()))]

        for one, three in zip(outcome(1), outcome(3), strict=True):
            assert torch.equal(one, three)

    yield check
    torch.set_num_threads(before)
