"""The selective scan's kernels on a CPU against the fp64 oracle."""

from __future__ import annotations

import pytest
import torch

from mamba_pretrain.ops import cuda_scan_kernels as kernels
from mamba_pretrain.ops import registry


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
            per_quad = min(lane_channels if kernel == "scan_backward" else 2, lane_channels, 64 // states)
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


def test_segments(make_case, check_selective_scan, emulated):
    emulated(segments=3)
    check_selective_scan(make_case(length=101), "emulated", dtype=torch.bfloat16, batch=1, channels=40, state=16)


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
