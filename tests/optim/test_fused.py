"""AdamW's step with a divisor against clipping and torch's own step."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mamba_pretrain.optim.config import OptimConfig
from mamba_pretrain.optim.fused import fused_step, takes_divisor

SHAPES = ((7, 5), (3,), (1, 4, 2), (0, 5))


def two_groups(**options):
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    groups = [{"params": parameters[:2], "weight_decay": 0.1}, {"params": parameters[2:], "weight_decay": 0.0}]
    return parameters, torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), **{"fused": True, **options})


def steps(step, count=3):
    parameters, optimizer = two_groups()
    for i in range(count):
        torch.manual_seed(i)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape)
        parameters[1].grad = None if i == 1 else parameters[1].grad
        step(parameters, optimizer)
    state = [optimizer.state[parameter][name] for parameter in parameters for name in ("step", "exp_avg", "exp_avg_sq")]
    return [*parameters, *state]


def test_divided_by_one_it_is_the_optimizer_s_step_to_the_bit():
    ours = steps(lambda parameters, optimizer: fused_step(optimizer, torch.tensor(1.0)))
    for a, b in zip(ours, steps(lambda parameters, optimizer: optimizer.step()), strict=True):
        assert torch.equal(a, b)


def test_the_divisor_clips():
    def clipped(parameters, optimizer):
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        torch.nn.utils.clip_grads_with_norm_(parameters, 0.3, norm)
        optimizer.step()

    def divided(parameters, optimizer):
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        fused_step(optimizer, ((norm + 1e-6) / 0.3).clamp(min=1.0))

    for a, b in zip(steps(divided), steps(clipped), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("options", [{"fused": False}, {"amsgrad": True}, {"maximize": True}], ids=str)
def test_what_it_does_not_do_is_left_to_the_optimizer(options):
    assert not takes_divisor(two_groups(**options)[1])
    assert takes_divisor(two_groups()[1])


def test_other_optimizers_are_left_alone():
    from mamba_pretrain.optim.muon import MuonWithAdamW

    parameters = [("layers.0.weight", nn.Parameter(torch.randn(4, 4)))], [("norm.weight", nn.Parameter(torch.randn(4)))]
    assert not takes_divisor(MuonWithAdamW(OptimConfig(name="muon"), *parameters))
    assert not takes_divisor(torch.optim.Adam(two_groups()[0], fused=True))


@pytest.mark.gpu
@pytest.mark.parametrize("divisor", [1.0, 1.7])
def test_the_kernel_of_our_own_does_what_torchs_does(divisor, monkeypatch):
    """Parameters and moments over three steps, of tensors that lie on and off 16 bytes."""
    from mamba_pretrain.optim import cuda_adamw

    def train() -> list[torch.Tensor]:
        torch.manual_seed(0)
        parameters = [nn.Parameter(torch.randn(size + shift, device="cuda")[shift:]) for size, shift in ((70_001, 0), (70_001, 1), (3, 0))]
        optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1, fused=True)
        for _ in range(3):
            for parameter in parameters:
                parameter.grad = torch.randn_like(parameter)
            fused_step(optimizer, torch.tensor(divisor, device="cuda"))
        return [*parameters, *(optimizer.state[p][name] for p in parameters for name in ("exp_avg", "exp_avg_sq", "step"))]

    calls: list[cuda_adamw.Table] = []
    ours = cuda_adamw.step
    monkeypatch.setattr(cuda_adamw, "step", lambda *arguments: calls.append(arguments[0]) or ours(*arguments))
    found, again = train(), train()
    assert len(calls) == 6
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    monkeypatch.setattr(cuda_adamw, "table_of", lambda *_: None)
    for a, b in zip(found, train(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
