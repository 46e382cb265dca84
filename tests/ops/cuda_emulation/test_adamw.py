"""AdamW's kernel on a CPU against torch's own step."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mamba_pretrain.ops import nvrtc, weight_copy
from mamba_pretrain.optim import cuda_adamw, fused

SIZES = (1, 3, 4, 1029, cuda_adamw.CHUNK, 2 * cuda_adamw.CHUNK + 5)


@pytest.fixture
def emulated(emulated_kernels, monkeypatch):
    """The kernel serves tensors on the CPU, which say that they are on a GPU where it asks."""
    monkeypatch.setattr(cuda_adamw, "unsupported", lambda lists: None)
    monkeypatch.setattr(nn.Parameter, "is_cuda", True)
    cuda_adamw._kernel.cache_clear()
    monkeypatch.setattr(cuda_adamw, "_kernel", lambda device: nvrtc.kernel("adamw.cu", cuda_adamw.MACROS, cuda_adamw.THREADS, device))


def optimizer_of(dtype=torch.float32, shift=0):
    """Two groups over parameters of many sizes; ``shift``: floats by which one lies off 16 bytes."""
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(size + shift)[shift:].to(dtype)) for size in SIZES]
    groups = [{"params": parameters[:3], "weight_decay": 0.1}, {"params": parameters[3:], "weight_decay": 0.0}]
    return parameters, torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), fused=True)


def train(step, dtype=torch.float32, shift=0, count=4):
    """Parameters and state after steps with gradients of many magnitudes, of which one parameter has none at first."""
    parameters, optimizer = optimizer_of(dtype, shift)
    for i in range(count):
        torch.manual_seed(i)
        for number, parameter in enumerate(parameters):
            gradient = torch.randn(parameter.shape) * 10.0 ** torch.randint(-9, 3, parameter.shape)
            parameter.grad = None if i == 0 and number == 1 else gradient.to(dtype)
        step(optimizer)
    return [*parameters, *(optimizer.state[p][name] for p in parameters for name in ("exp_avg", "exp_avg_sq", "step"))]


@pytest.mark.parametrize("shift", [0, 1])
def test_steps_are_torchs(shift, emulated):
    divisor = torch.tensor(1.7)
    found = train(lambda optimizer: fused.fused_step(optimizer, divisor), shift=shift)

    def exact(optimizer):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None if parameter.grad is None else parameter.grad / 1.7
        optimizer.step()

    for a, b in zip(found, train(exact, torch.float64, shift=shift), strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-4, atol=2e-8)  # what sums that cancel leave of fp32


def test_the_table_follows_gradients_and_keeps_what_has_not_moved(emulated):
    parameters, optimizer = optimizer_of()
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    fused.fused_step(optimizer, torch.tensor(1.0))
    first = dict(cuda_adamw._tables[optimizer])
    fused.fused_step(optimizer, torch.tensor(1.0))
    assert cuda_adamw._tables[optimizer] == first
    parameters[0].grad = torch.full_like(parameters[0], -3.0)
    before = parameters[0].detach().clone()
    fused.fused_step(optimizer, torch.tensor(1.0))
    second = cuda_adamw._tables[optimizer]
    assert second[0] is not first[0]
    assert second[0].chunks is first[0].chunks
    assert second[1] is first[1]
    assert not torch.equal(parameters[0], before)
    assert optimizer.state[parameters[0]]["step"] == 3


def test_nothing_to_update(emulated):
    _, optimizer = optimizer_of()
    fused.fused_step(optimizer, torch.tensor(1.0))
    assert not optimizer.state
    parameter = nn.Parameter(torch.empty(0, 5))
    parameter.grad = torch.empty(0, 5)
    fused.fused_step(torch.optim.AdamW([parameter], fused=True), torch.tensor(1.0))


@pytest.mark.parametrize("shift", [0, 1])
def test_copies_are_written_with_their_weights(shift, emulated):
    parameters, optimizer = optimizer_of(shift=shift)
    kept, stale, *others = parameters[2:]
    for parameter in (kept, stale, *others):
        weight_copy.keep(parameter)
    weight_copy.refresh([kept, *others])
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape)
    versions = [parameter._version for parameter in parameters]
    fused.fused_step(optimizer, torch.tensor(1.0))
    assert all(parameter._version > version for parameter, version in zip(parameters, versions, strict=True))
    for parameter in (kept, *others):
        assert torch.equal(weight_copy.valid(parameter), parameter.bfloat16())
    assert weight_copy.valid(stale) is None
