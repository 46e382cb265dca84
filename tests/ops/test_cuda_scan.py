"""The selective scan's own kernels against the fp64 oracle; on a GPU, and what can be known without one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from mamba_pretrain.ops import cuda_scan, registry
from mamba_pretrain.ops import cuda_scan_kernels as kernels
from mamba_pretrain.ops.selective_scan import selective_scan

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def operands(b=2, l=100, d=64, n=16, dtype=torch.bfloat16, device="cuda", strided=False):
    """Random inputs; ``strided``: u and z halves of one tensor, B and C slices of another, as in a Mamba-1 mixer."""
    new = {"device": device, "dtype": dtype}
    if strided:
        u, z = torch.randn(b, l, 2 * d, **new).chunk(2, dim=-1)
        _, B, C = torch.randn(b, l, 8 + 2 * n, **new).split([8, n, n], dim=-1)
    else:
        u, z = torch.randn(2, b, l, d, **new)
        B, C = torch.randn(2, b, l, n, **new)
    delta = torch.randn(b, l, d, **new) - 2
    A = -4 * torch.rand(d, n, device=device) - 0.01
    D, bias = torch.randn(2, d, device=device)
    return {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z, "delta_bias": bias}


def gradients(arguments, **options):
    """Outputs and gradients of every input through the kernels."""
    inputs = {k: t.detach().requires_grad_() for k, t in arguments.items()}
    with registry.using(selective_scan="cuda"):
        y, final = selective_scan(**inputs, return_final_state=True, **options)
    generator = torch.Generator(y.device).manual_seed(1)
    dy = torch.randn(y.shape, generator=generator, device=y.device).to(y.dtype)
    dfinal = torch.randn(final.shape, generator=generator, device=y.device)
    return [y, final, *torch.autograd.grad([y, final], list(inputs.values()), [dy, dfinal])]


@pytest.fixture
def short_segments(monkeypatch):
    """Lets even short sequences be cut."""
    monkeypatch.setattr(kernels, "SHORTEST_SEGMENT", 16)
    kernels.shape.cache_clear()
    yield
    kernels.shape.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cases(selective_scan_case, check_selective_scan, dtype):
    check_selective_scan(selective_scan_case, "cuda", device="cuda", dtype=dtype, channels=64, state=16)


@pytest.mark.gpu
@pytest.mark.parametrize("state", kernels.STATES)
@pytest.mark.parametrize(("channels", "dtype"), [(72, torch.bfloat16), (37, torch.bfloat16), (130, torch.float32)], ids=str)
def test_state_sizes_and_odd_channels(short_selective_scan_case, check_selective_scan, state, channels, dtype):
    check_selective_scan(short_selective_scan_case, "cuda", device="cuda", dtype=dtype, channels=channels, state=state)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_segments(selective_scan_case, check_selective_scan, dtype, short_segments):
    check_selective_scan(selective_scan_case, "cuda", device="cuda", dtype=dtype, channels=64, state=16)


@pytest.mark.gpu
def test_segments_of_every_state_size(short_selective_scan_case, check_selective_scan, short_segments):
    for state in kernels.STATES:
        check_selective_scan(short_selective_scan_case, "cuda", device="cuda", dtype=torch.bfloat16, channels=40, state=state)


@pytest.mark.gpu
def test_strided_inputs_equal_contiguous_ones():
    torch.manual_seed(0)
    strided = operands(strided=True)
    assert not strided["u"].is_contiguous()
    for a, b in zip(gradients(strided), gradients({k: t.contiguous() for k, t in strided.items()}), strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_runs_are_equal_to_the_bit(dtype):
    torch.manual_seed(0)
    arguments = operands(b=3, l=1500, d=200, dtype=dtype)
    seq_idx = (torch.rand(3, 1500, device="cuda") < 0.02).int().cumsum(1).int()
    for a, b in zip(gradients(arguments, seq_idx=seq_idx), gradients(arguments, seq_idx=seq_idx), strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("start", [1, 7, 16, 32, 33, 99])
def test_documents_are_isolated_to_the_bit(start, check_isolation):
    torch.manual_seed(0)
    arguments = operands(device="cpu")
    sequences = {k: arguments.pop(k) for k in ("u", "delta", "B", "C", "z")}
    shared = {k: t.cuda() for k, t in arguments.items()}
    with registry.using(selective_scan="cuda"):
        check_isolation(selective_scan, sequences, shared, start, device="cuda")


def test_what_cannot_be_served_is_said_in_words(monkeypatch):
    arguments = operands(device="cpu")
    assert "needs a CUDA device" in cuda_scan.unsupported(registry.Request(arguments))
    monkeypatch.setattr(registry.Request, "device", "cuda")
    odd = {**arguments, "A": arguments["A"][:, :5]}
    assert "8, 16, 32, 64 states a channel, not 5" in cuda_scan.unsupported(registry.Request(odd))
    assert "float64" in cuda_scan.unsupported(registry.Request({**arguments, "u": arguments["u"].double()}))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "capability 8.0" in cuda_scan.unsupported(registry.Request(arguments))


@pytest.fixture
def h100(monkeypatch):
    """The device's properties without the device."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(major=9, minor=0, multi_processor_count=132))
    caches = (kernels.shape, kernels._kernel, kernels._plain_kernel)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.mark.parametrize(("batch", "channels", "length"), [(8, 4096, 2048), (16, 1536, 2048), (1, 4096, 65536), (1, 37, 1)])
@pytest.mark.parametrize("kernel", ["scan_forward", "scan_carry", "scan_backward"])
@pytest.mark.parametrize("states", kernels.STATES)
def test_shapes_cover_all_channels_and_fit_on_the_device(h100, kernel, batch, channels, length, states):
    shape = kernels.shape(kernel, 0, torch.bfloat16, batch, length, channels, states)
    assert shape.blocks * shape.warps * 8 * shape.lane_channels >= channels
    assert shape.lane_channels * states <= 64
    assert 1 <= shape.segments <= max(1, length // kernels.SHORTEST_SEGMENT)
    if kernel == "scan_forward":
        behind = kernels.shape("scan_backward", 0, torch.bfloat16, batch, length, channels, states)
        assert behind.lane_channels % shape.lane_channels == 0  # a lane's channels share a twist


def test_twelve_warps_share_a_multiprocessor_only_where_their_registers_suffice(h100):
    def resident(states):
        shape = kernels.shape("scan_backward", 0, torch.bfloat16, 16, 2048, 1536, states)
        return shape.warps * shape.min_blocks

    assert [resident(states) for states in kernels.STATES] == [12, 12, 8, 8]


def test_length_is_cut_only_where_the_device_is_not_full(h100):
    def segments(batch, length):
        return kernels.shape("scan_forward", 0, torch.bfloat16, batch, length, 4096, 16).segments

    assert segments(8, 2048) == 1
    assert segments(1, 65536) == 8
    assert segments(1, 300) == 1


def test_warm_up_loads_what_a_call_needs(h100, monkeypatch):
    loaded = []
    monkeypatch.setattr(kernels.nvrtc, "kernel", lambda file, macros, block, device: loaded.append((file, macros["STATES"])))
    kernels.warm_up(torch.bfloat16, batch=8, length=2048, channels=4096, states=16, device=0)
    assert loaded == [("scan_forward.cu", 16), ("scan_backward.cu", 16), ("scan_reduce.cu", 16)]
    kernels.warm_up(torch.bfloat16, batch=1, length=65536, channels=4096, states=16, device=0)
    assert {"scan_carry.cu", "scan_join.cu"} <= {file for file, _ in loaded}
