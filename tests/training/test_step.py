"""A step's metrics: read one step late, without waiting for the step behind it."""

from __future__ import annotations

import pytest
import torch

from mamba_pretrain.training.step import StepMetrics


def test_metrics_are_read_as_the_tensors_say():
    loss, norm = torch.tensor(2.3456789), torch.tensor(0.1)
    assert StepMetrics(loss, norm, torch.tensor(7.0), False).read() == (float(loss), float(norm))


def test_metrics_are_those_of_their_step():
    loss = torch.tensor(1.0)
    metrics = StepMetrics(loss, torch.tensor(float("inf")), torch.tensor(7.0), False)
    loss += 1.0
    assert metrics.read() == (1.0, float("inf"))


@pytest.mark.gpu
def test_reading_does_not_wait_for_what_is_queued_behind():
    values = torch.full((), 3.0, device="cuda"), torch.full((), 4.0, device="cuda")
    StepMetrics(*values, values[0], False).read()  # the first call allocates
    metrics = StepMetrics(*values, values[0], False)
    torch.cuda._sleep(2_000_000_000)  # cycles: about a second
    behind = torch.cuda.Event()
    behind.record()
    assert metrics.read() == (3.0, 4.0)
    assert not behind.query()
    torch.cuda.synchronize()
