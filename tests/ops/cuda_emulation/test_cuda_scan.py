"""The selective scan's kernels on a CPU against the fp64 oracle."""

from __future__ import annotations

import math
import shutil

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mamba_pretrain.ops import cuda_scan_kernels as kernels
from mamba_pretrain.ops import nvrtc, registry
from mamba_pretrain.ops.selective_scan import selective_scan


@pytest.fixture
def emulated(emulated_kernels, monkeypatch):
    """Registers the implementation ``emulated``; calling the fixture sets how kernels run."""

    class Scan(torch.autograd.Function):
        @staticmethod
        def forward(ctx, u, delta, A, B, C, D, z, delta_bias, seq_idx, initial):
            ctx.ops = kernels.Operands(*(None if t is None else t.detach() for t in (u, delta, A, B, C, D, z, delta_bias, seq_idx)))
            y, final, ctx.checkpoints = kernels.forward(ctx.ops, initial, save=True)
            ctx.present = [t is not None for t in (u, delta, A, B, C, D, z, delta_bias, initial)]
            return y, final

        @staticmethod
        def backward(ctx, dy, dfinal):
            found = kernels.backward(ctx.ops, dy.contiguous(), dfinal.contiguous(), ctx.checkpoints).in_order()
            *grads, dinitial = (g if there else None for g, there in zip(found, ctx.present, strict=True))
            return *grads, None, dinitial

    def scan(u, delta, A, B, C, D, z, delta_bias, seq_idx, initial_state, return_final_state):
        y, final = Scan.apply(u, delta, A, B, C, D, z, delta_bias, seq_idx, initial_state)
        return (y, final) if return_final_state else y

    named = {**registry._implementations["selective_scan"]}
    monkeypatch.setitem(registry._implementations, "selective_scan", named)
    registry.register("selective_scan", "emulated", priority=-1)(scan)

    def set_shapes(segments: int = 1, lane_channels: int = 4, warps: int = 2) -> None:
        def shape(kernel, device, dtype, batch, length, channels, states):
            per_quad = min(2 if kernel == "scan_forward" else lane_channels, lane_channels, 64 // states)
            polynomial_every = 8 if kernel == "scan_forward" else 0  # as on an H100
            return kernels.Shape(per_quad, warps, 1, polynomial_every, -(-channels // (warps * 8 * per_quad)), segments)

        monkeypatch.setattr(kernels, "shape", shape)
        kernels._kernel.cache_clear()
        kernels._plain_kernel.cache_clear()

    yield set_shapes
    kernels._kernel.cache_clear()
    kernels._plain_kernel.cache_clear()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"starts": (15,), "length": 16},
        {"starts": "every", "length": 33},
        {"decay": (1e-8, 1e4), "delta": (0.0, 4.0)},
        {"optional": False, "initial": False, "final": False, "starts": "none"},
    ],
    ids=["usual", "one-tile", "starts-everywhere", "decays-of-all-sizes", "only-what-is-required"],
)
def test_some_cases(changes, make_case, check_selective_scan, emulated):
    emulated()
    check_selective_scan(make_case(**changes), "emulated", dtype=torch.bfloat16, batch=1, channels=40, state=16)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"decay": (1e3, 1e5), "starts": "none"},
        {"decay": (1e-8, 1e-4), "starts": "none", "length": 192},
        {"decay": (1e-5, 1e4), "delta": (0.0, 4.0)},
        {"delta": (-12.0, 1.0), "starts": (35, 36, 96)},
        {"starts": (32, 64)},
    ],
    ids=["usual", "complete-decay", "hardly-any-decay", "decays-of-all-sizes", "starts-inside", "starts-at-edges"],
)
def test_segments(changes, make_case, check_selective_scan, emulated):
    emulated(segments=3)
    case = make_case(**{"length": 101, **changes})
    check_selective_scan(case, "emulated", dtype=torch.bfloat16, batch=1, channels=40, state=16)


def test_documents_are_isolated_to_the_bit_across_segments(check_isolation, emulated):
    torch.manual_seed(0)
    emulated(segments=3)
    sequences = {k: torch.randn(1, 100, 40).bfloat16() for k in ("u", "delta", "z")}
    sequences |= {k: torch.randn(1, 100, 16).bfloat16() for k in "BC"}
    with registry.using(selective_scan="emulated"):
        check_isolation(selective_scan, sequences, {"A": -torch.rand(40, 16), "delta_bias": torch.randn(40)}, start=37)


# -- what segments receive from one another -----------------------------------------------------------------------------------------------


def long_operands(
    rates: Tensor, length: int = 624, steps: float = -2.0, starts: tuple[int, ...] = (), bias: bool = False
) -> kernels.Operands:
    """fp32 operands of one row, in which only what differs between tests matters. ``rates``: -A (channels, states)."""
    channels, states = rates.shape
    seq_idx = torch.zeros(1, length, dtype=torch.int32)
    seq_idx[0, list(starts)] = 1
    return kernels.Operands(
        u=torch.randn(1, length, channels),
        delta=steps + torch.randn(1, length, channels),
        A=-rates,
        B=torch.randn(1, length, states),
        C=torch.randn(1, length, states),
        D=None,
        z=torch.randn(1, length, channels),
        delta_bias=torch.randn(channels) if bias else None,
        seq_idx=seq_idx.cumsum(1, dtype=torch.int32) if starts else None,
    )


def received(ops: kernels.Operands, reverse: bool, values: Tensor, outer: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What segments receive, by the kernels and by the fp64 recurrence; the second with a bound of the first's error in units of fp32's."""
    segments = ops.cut(3)
    found = kernels.received_by_segments(ops, segments, values, outer, reverse)
    bias = 0 if ops.delta_bias is None else ops.delta_bias.double()
    step = F.softplus(ops.delta.double() + bias, threshold=1e4)
    keep = torch.ones(1, ops.length, 1, 1, dtype=torch.float64)
    if ops.seq_idx is not None:
        keep[:, 1:, 0, 0] = (ops.seq_idx[:, 1:] == ops.seq_idx[:, :-1]).double()
    decay = keep * torch.exp(step[..., None] * ops.A.double())
    weight, vector = (values.double() * F.silu(ops.z.double()), ops.C) if reverse else (step * values.double(), ops.B)
    term = weight[..., None] * vector.double()[:, :, None]
    pair = [torch.zeros(1, ops.channels, ops.states, dtype=torch.float64) if outer is None else outer.double()] * 2
    exact = torch.empty(2, *found.shape, dtype=torch.float64)
    for t in reversed(range(ops.length)) if reverse else range(ops.length):
        if t == ops.length - 1 or (t + 1) % segments.length == 0 if reverse else t % segments.length == 0:
            exact[:, :, t // segments.length] = torch.stack(pair)
        for i, x in enumerate((term[:, t], term[:, t].abs())):
            pair[i] = decay[:, t] * (x + pair[i]) if reverse else decay[:, t] * pair[i] + x
    return found, exact


def check_received(ops: kernels.Operands, values: Tensor | None = None, tolerance: float = 3e-5) -> None:
    """Both directions; errors relative to what the terms weigh where they arrive, but for decays that underflow (2^-126)."""
    values = ops.u if values is None else values
    for reverse in (False, True):
        outer = torch.randn(1, ops.channels, ops.states)
        found, (exact, weight) = received(ops, reverse, values, outer)
        error = (found - exact).abs() / (weight + 1e-37 / tolerance * values.abs().max())
        assert error.max() <= tolerance, (reverse, error.max())


RATES = {
    "fast": lambda c, n: 300 + 300 * torch.rand(c, n),
    "slow": lambda c, n: 1e-6 * torch.rand(c, n),
    "one-slow-pair": lambda c, n: torch.where(torch.arange(c * n).view(c, n) == 77, 1e-4, 40.0),
    "one-slow-channel": lambda c, n: torch.where(torch.arange(c)[:, None] == 9, 1e-3, 20.0).repeat(1, n),
    "of-all-sizes": lambda c, n: 10 ** torch.empty(c, n).uniform_(-5, 3),
    "as-initialised": lambda c, n: torch.arange(1.0, n + 1).repeat(c, 1),
    "growing": lambda c, n: -0.05 * torch.rand(c, n),
}


@pytest.mark.parametrize("starts", [(), (150, 333, 334, 400)], ids=["one-document", "documents"])
@pytest.mark.parametrize("rates", RATES)
def test_segments_receive_what_the_recurrence_gives(rates, starts, emulated):
    if rates == "growing" and starts:
        pytest.skip("a document's start is a decay")
    torch.manual_seed(0)
    emulated(segments=3)
    check_received(long_operands(RATES[rates](40, 16), starts=starts, bias=True))


@pytest.mark.slow
@pytest.mark.parametrize("states", kernels.STATES)
@pytest.mark.parametrize("lane_channels", [1, 2, 4])
def test_segments_receive_it_with_every_shape_of_a_warp(lane_channels, states, emulated):
    torch.manual_seed(0)
    emulated(segments=3, lane_channels=lane_channels, warps=1)
    check_received(long_operands(RATES["of-all-sizes"](37, states), length=300, starts=(120,)))


@pytest.mark.parametrize("bits", [60, 100, 120])
def test_nothing_is_dropped_that_fp32_can_see(bits, emulated):
    """In each segment one large value, as far as can be from the end that passes it on, where it arrives with 2^-bits and alone."""
    torch.manual_seed(0)
    emulated(segments=3)
    ops = long_operands(torch.ones(40, 16), steps=-3.0)
    segments = ops.cut(3)
    total = F.softplus(ops.delta).view(segments.count, segments.length, ops.channels).sum(1).amax(0)
    ops.A = (-bits * math.log(2) / total)[:, None].repeat(1, ops.states)
    for far in (0, segments.length - 1):
        values = torch.zeros_like(ops.u)
        values[:, far :: segments.length] = 1e4
        check_received(ops, values, tolerance=1e-4)


@pytest.mark.parametrize("rates", ["fast", "slow"])
def test_what_has_decayed_is_not_read(rates, emulated):
    """NaN where nothing that is left can see it. Read, it would show; and a walk to the end would cost what it always did."""
    torch.manual_seed(0)
    emulated(segments=3)
    ops = long_operands(RATES[rates](40, 16), starts=() if rates == "fast" else (104, 312, 520))
    segments = ops.cut(3)
    at = torch.arange(ops.length) % segments.length
    for reverse, unread in ((False, at < 96), (True, at >= 112)):
        values = torch.where(unread[:, None], torch.nan, ops.u)
        assert kernels.received_by_segments(ops, segments, values, None, reverse).isfinite().all()


@pytest.mark.parametrize("watched", [True])
@pytest.mark.parametrize(
    ("changes", "shape", "operands"),
    [
        ({}, {}, {"channels": 40, "state": 16}),
        ({"optional": False, "initial": False}, {}, {"channels": 40, "state": 16}),
        ({"length": 83}, {"segments": 3, "warps": 1}, {"channels": 37, "state": 16}),
        ({"length": 37}, {"lane_channels": 2, "warps": 3}, {"channels": 56, "state": 16}),
        ({"length": 37}, {}, {"channels": 40, "state": 8}),
        ({"length": 37}, {}, {"channels": 24, "state": 64}),
    ],
    ids=["usual", "only-what-is-required", "segments-odd-channels", "two-channels-a-quad", "8-states", "64-states"],
)
def test_barriers_put_every_access_in_order(changes, shape, operands, make_case, check_selective_scan, emulated):
    emulated(**shape)
    check_selective_scan(make_case(**changes), "emulated", dtype=torch.bfloat16, batch=1, **operands)


@pytest.mark.parametrize("watched", [True])
@pytest.mark.parametrize(
    ("file", "barrier"), [("scan_forward.cu", "__syncwarp"), ("scan_backward.cu", "__syncwarp"), ("scan_backward.cu", "__syncthreads")]
)
def test_a_missing_barrier_is_seen(file, barrier, make_case, check_selective_scan, emulated, tmp_path, monkeypatch):
    sources = tmp_path / "sources"
    shutil.copytree(nvrtc.SOURCES, sources)
    text = (sources / file).read_text()
    (sources / file).write_text("".join(text.rpartition(f"{barrier}();")[::2]))  # without its last
    monkeypatch.setattr(nvrtc, "SOURCES", sources)
    emulated()
    with pytest.raises(AssertionError, match=r"at byte \d+ of shared memory, by lane"):
        check_selective_scan(make_case(length=37), "emulated", dtype=torch.bfloat16, batch=1, channels=40, state=16)


@pytest.mark.parametrize("state", [8, 16])
def test_one_channel_a_quad(state, make_case, check_selective_scan, emulated):
    emulated(lane_channels=1)
    check_selective_scan(make_case(length=37), "emulated", dtype=torch.bfloat16, batch=1, channels=40, state=state)


@pytest.mark.slow
def test_all_cases(short_selective_scan_case, check_selective_scan, emulated):
    emulated()
    check_selective_scan(short_selective_scan_case, "emulated", dtype=torch.bfloat16, channels=72, state=16)


@pytest.mark.slow
def test_all_cases_in_segments(short_selective_scan_case, check_selective_scan, emulated):
    emulated(segments=3)
    check_selective_scan(short_selective_scan_case, "emulated", dtype=torch.bfloat16, batch=1, channels=40, state=16)


@pytest.mark.slow
@pytest.mark.parametrize("state", kernels.STATES)
@pytest.mark.parametrize(("channels", "dtype"), [(24, torch.float32), (37, torch.float16)], ids=str)
def test_state_sizes(make_case, check_selective_scan, state, channels, dtype, emulated):
    emulated()
    check_selective_scan(make_case(), "emulated", dtype=dtype, channels=channels, state=state)


@pytest.mark.slow
def test_two_channels_a_quad(make_case, check_selective_scan, emulated):
    emulated(lane_channels=2, warps=3)
    check_selective_scan(make_case(), "emulated", dtype=torch.bfloat16, channels=56, state=16)


@pytest.mark.parametrize(("wide", "begin", "times"), [(80, 40, 2), (120, 0, 3), (120, 80, 3)])
def test_the_gates_gradient_may_be_a_part_of_a_wider_tensor(wide, begin, times, emulated):
    emulated()
    torch.manual_seed(0)
    ops = drawn_operands()
    checkpoints, dout, buffer = kernels.forward(ops, None, save=True)[2], torch.randn(2, 37, 40).bfloat16(), torch.full((2, 37, wide), 7.0)
    expected = kernels.backward(ops, dout, None, checkpoints).in_order()
    buffer = buffer.bfloat16()
    dz = buffer[..., begin : begin + 40]
    assert kernels.gate_row(dz) == times
    found = kernels.backward(ops, dout, None, checkpoints, dz).in_order()
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
    dz.fill_(7)
    assert (buffer == 7).all()  # nothing else was written


def test_rows_that_are_no_multiple_are_told():
    assert kernels.gate_row(None) == 1
    assert kernels.gate_row(torch.empty(2, 37, 40)) == 1
    assert kernels.gate_row(torch.empty(2, 37, 90)[..., :40]) is None
    assert kernels.gate_row(torch.empty(2, 50, 80)[:, :37, :40]) is None


def test_rows_that_the_kernel_does_not_know_are_refused(emulated):
    emulated()
    ops = drawn_operands()
    checkpoints = kernels.forward(ops, None, save=True)[2]
    with pytest.raises(ValueError, match="whose width is a multiple of dz's"):
        kernels.backward(ops, torch.randn(2, 37, 40).bfloat16(), None, checkpoints, torch.empty(2, 37, 90).bfloat16()[..., :40])


def drawn_operands() -> kernels.Operands:
    def low(*shape):
        return torch.randn(shape).bfloat16()

    u, delta, B, C, z = low(2, 37, 40), low(2, 37, 40), low(2, 37, 16), low(2, 37, 16), low(2, 37, 40)
    return kernels.Operands(u, delta, -torch.rand(40, 16), B, C, torch.randn(40), z, torch.randn(40), None)


def test_results_are_what_compilers_are_told(emulated):
    """Shapes and dtypes of the fake kernels, which torch.compile and the FLOP counter use."""
    emulated()
    arguments = {
        "u": torch.randn(1, 20, 40, dtype=torch.bfloat16),
        "delta": torch.randn(1, 20, 40, dtype=torch.bfloat16),
        "A": -torch.rand(40, 16),
        "B": torch.randn(1, 20, 16, dtype=torch.bfloat16),
        "C": torch.randn(1, 20, 16, dtype=torch.bfloat16),
        "D": torch.randn(40),
        "z": torch.randn(1, 20, 40, dtype=torch.bfloat16),
        "delta_bias": torch.randn(40),
        "seq_idx": torch.zeros(1, 20, dtype=torch.int32),
    }
    ops = kernels.Operands(**arguments)
    found = kernels.forward(ops, None, save=True)
    gradients = kernels.backward(ops, torch.randn(1, 20, 40).bfloat16(), None, found[2]).in_order()
    meta = [t.to("meta") for t in arguments.values()]
    told = torch.ops.mamba_pretrain.cuda_scan_forward(*meta, None, True)
    told_gradients = torch.ops.mamba_pretrain.cuda_scan_backward(told[0], None, *meta, told[2])
    for real, fake in zip([*found, *gradients], [*told, *told_gradients], strict=True):
        assert (real.shape, real.dtype) == (fake.shape, fake.dtype)
