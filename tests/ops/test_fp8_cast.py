"""Casts to 8 bits: what is stored, how far it is from what was given, and that the Triton kernels store the same bits."""

from __future__ import annotations

import importlib.util
import itertools
import os
import subprocess
import sys

import pytest
import torch

from mamba_pretrain.ops import fp8_cast
from mamba_pretrain.ops.fp8_cast import BLOCK, SCALINGS, SHIFT, Scaled, cast, cast_both, cast_columns, cast_rows

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = tuple(SHIFT)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def draw(*shape, device="cpu", dtype=torch.bfloat16, seed=0):
    """Magnitudes over several decades, by row and by column."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator)
    spread = [torch.logspace(-2, 2, n)[torch.randperm(n, generator=generator)] for n in shape]
    return (x * spread[0][:, None] * spread[1]).to(device, dtype)


def bits(t):
    return t.view(torch.uint8 if t.dtype.itemsize == 1 else torch.int32)


def same(found, expected):
    return all(
        a.shape == b.shape and a.stride() == b.stride() and torch.equal(bits(a), bits(b)) for a, b in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scaling", SCALINGS)
def test_values_are_what_the_format_can_hold(device, scaling, dtype):
    x = draw(96, 272, device=device)
    info = torch.finfo(dtype)
    for source, scaled in zip((x, x.t()), cast_both([x], scaling, dtype), strict=True):
        assert torch.equal(scaled.scale.log2(), scaled.scale.log2().round())
        largest = scaled.values.float().abs()
        assert info.max / 2 <= largest.max() <= info.max, "a power of two that uses the range"
        error = (scaled.restored() - source.float()).abs()
        wide = scaled.scale.repeat_interleave(BLOCK, 1)[:, : source.shape[1]] if scaling == "blockwise" else scaled.scale
        assert torch.all(error <= torch.maximum(source.float().abs() * info.eps / 2, wide * info.smallest_normal * info.eps / 2))


@pytest.mark.parametrize("scaling", SCALINGS)
def test_scales_are_those_of_their_groups(scaling):
    x = draw(64, 300)
    rows, columns = cast_both([x], scaling, torch.float8_e4m3fn)
    shapes = {"tensorwise": [(1, 1), (1, 1)], "rowwise": [(64, 1), (300, 1)], "blockwise": [(64, 3), (300, 1)]}[scaling]
    assert [tuple(rows.scale.shape), tuple(columns.scale.shape)] == shapes
    for source, scaled in ((x, rows), (x.t(), columns)):
        groups = {"tensorwise": [source], "rowwise": [source], "blockwise": source.split(BLOCK, 1)}[scaling]
        largest = torch.cat([g.float().abs().amax((0, 1) if scaling == "tensorwise" else 1).view(-1, 1) for g in groups], 1)
        assert torch.all(largest <= scaled.scale * 448)
        assert torch.all(largest > scaled.scale * 224)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scaling", SCALINGS)
def test_a_transpose_is_the_cast_of_the_transposed(device, scaling):
    x = draw(160, 208, device=device)
    assert same(cast_columns([x], scaling, torch.float8_e4m3fn), cast_rows([x.t().contiguous()], scaling, torch.float8_e4m3fn))
    both = cast_both([x], scaling, torch.float8_e4m3fn)
    assert same(both[0], cast_rows([x], scaling, torch.float8_e4m3fn))
    assert same(both[1], cast_columns([x], scaling, torch.float8_e4m3fn))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("widths", [(128, 80), (96, 112), (16, 16, 176)])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_parts_are_cast_as_one_matrix(device, scaling, widths):
    wide = draw(48, 400, device=device)
    parts = [wide[:, 1 : 1 + width] if i else wide[:, :width].contiguous() for i, width in enumerate(widths)]
    assert same(cast(parts, scaling, torch.float8_e5m2, True, True), cast([torch.cat(parts, 1)], scaling, torch.float8_e5m2, True, True))


def test_what_is_not_asked_for_is_empty():
    found = cast([draw(16, 32)], "rowwise", torch.float8_e4m3fn, False, True)
    assert [t.numel() for t in found] == [0, 0, 32 * 16, 32]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scaling", SCALINGS)
def test_extremes(device, scaling, dtype):
    """Zeros stay zeros, largest values stay themselves, and neither tiny nor huge magnitudes leave the format."""
    for value in (0.0, 1.75, 448.0, 57344.0, 3e38, 1e-38, 449.0):
        x = torch.full((16, 16), value, device=device).bfloat16()
        restored = cast_rows([x], scaling, dtype).restored()
        assert torch.all((restored - x.float()).abs() <= x.float() * torch.finfo(dtype).eps / 2)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_a_value_that_is_not_finite_is_seen(device, scaling, value):
    x = draw(32, 272, device=device)
    x[5, 200] = value
    for i, scaled in enumerate(cast_both([x], scaling, torch.float8_e4m3fn)):
        restored = scaled.restored()
        assert not restored[5, 200].isfinite() if i == 0 else not restored[200, 5].isfinite()
        if scaling != "tensorwise":  # and spoils its own group only
            assert restored[:5].isfinite().all() if i == 0 else restored[:200].isfinite().all()


def test_wide_tensors_are_rounded_to_bf16_first():
    """So that weights which an engine gathers in bf16 give the same as those which autocast would round."""
    x = draw(32, 48, dtype=torch.float32)
    assert same(cast([x], "rowwise", torch.float8_e4m3fn, True, True), cast([x.bfloat16()], "rowwise", torch.float8_e4m3fn, True, True))


def test_fake_tensors_have_the_same_shapes_and_strides():
    from torch._subclasses.fake_tensor import FakeTensorMode

    for scaling in SCALINGS:
        real = cast([draw(32, 300)], scaling, torch.float8_e4m3fn, True, True)
        with FakeTensorMode():
            fake = cast([torch.empty(32, 300, dtype=torch.bfloat16)], scaling, torch.float8_e4m3fn, True, True)
        assert [(t.shape, t.stride(), t.dtype) for t in fake] == [(t.shape, t.stride(), t.dtype) for t in real]


# -- the kernels ----------------------------------------------------------------------------------------------------------------------------


def exact(rows, n, device="cpu", dtype=torch.bfloat16):
    """Values that 8 bits hold whatever their scale, since the interpreter does not round as GPUs do: small integers times nearby powers of two."""
    generator = torch.Generator().manual_seed(rows + n)
    x = torch.randint(-3, 4, (rows, n), generator=generator) * 2.0 ** torch.randint(-1, 2, (rows, n), generator=generator)
    return (x * 2.0 ** torch.randint(-2, 3, (rows, 1), generator=generator)).to(device, dtype)


def check_kernels(device, make, cases):
    """Both copies in every dtype; one alone in one, as every combination is compiled."""
    usual = torch.float8_e4m3fn, torch.bfloat16
    for (shape, widths), scaling, dtype, source in itertools.product(cases, SCALINGS, DTYPES, (torch.bfloat16, torch.float32)):
        parts = list(make(*shape, device=device, dtype=source).split(widths, 1))
        for wanted in [(True, True), (True, False), (False, True)][: 3 if (dtype, source) == usual else 1]:
            found, expected = (of(parts, scaling, dtype, *wanted) for of in (fp8_cast._launched, fp8_cast.reference))
            assert same(found, expected), (shape, widths, scaling, dtype, source, wanted)


@pytest.mark.skipif(not INTERPRETED, reason="runs in the subprocess that test_interpreted_on_cpu starts, with TRITON_INTERPRET=1")
def test_in_the_interpreter():
    check_kernels("cpu", exact, [((48, 16), [16]), ((160, 144), [128, 16]), ((16, 208), [96, 112])])


@pytest.mark.skipif(INTERPRETED, reason="already in the subprocess")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_interpreted_on_cpu():
    # The interpreter must be chosen before triton is first imported.
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "in_the_interpreter", __file__]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "1 passed" in result.stdout


@pytest.mark.gpu
def test_kernels_store_the_bits_of_the_reference():
    shapes = [((48, 16), [16]), ((160, 144), [128, 16]), ((16, 208), [96, 112]), ((4096, 8512), [4096, 4352, 64]), ((1008, 2048), [2048])]
    check_kernels("cuda", draw, shapes)
    check_kernels("cuda", exact, shapes[:3])


@pytest.mark.gpu
@pytest.mark.parametrize("scaling", SCALINGS)
def test_past_32_bits_of_offsets(scaling):
    """More than 2**31 values: the last tile lies past what 32 bits address."""
    rows, n = 1 << 17, (1 << 14) + 128
    x = torch.zeros(rows, n, device="cuda", dtype=torch.bfloat16)
    x[-48:, -48:] = exact(48, 48, "cuda")
    for i, scaled in enumerate(cast_both([x], scaling, torch.float8_e4m3fn)):
        corner = Scaled(scaled.values[-48:, -128:], scaled.scale if scaling == "tensorwise" else scaled.scale[-48:, -1:])
        expected = (x if i == 0 else x.t())[-48:, -128:].float()
        assert torch.equal(corner.restored(), expected)
