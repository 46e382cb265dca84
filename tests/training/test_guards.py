import math
from types import SimpleNamespace

import pytest

from mamba_pretrain.training.config import SpikeConfig
from mamba_pretrain.training.guards import ResumeGuard, SpikeGuard, TrainingError, describe_differences, is_spike
from mamba_pretrain.training.state import TrainState

STEADY = [2.0 + 0.01 * (i % 5) for i in range(64)]


class FakeRun(SimpleNamespace):
    def __init__(self):
        super().__init__(state=TrainState(), events=[], skip_if=None)

    def event(self, name, **details):
        self.events.append((name, details))


def feed(guard, run, losses, norms=None, **extra):
    for step, loss in enumerate(losses):
        norm = norms[step] if norms else 1.0 + 0.01 * (step % 3)
        run.state.remember(loss, norm)
        guard.on_row(run, {"kind": "train", "step": step, "loss": loss, "grad_norm": norm, **extra})


@pytest.mark.parametrize(
    ("value", "history", "expected"),
    [
        (math.nan, [], True),
        (math.inf, STEADY, True),
        (2.02, STEADY, False),
        (9.0, STEADY, True),
        (9.0, STEADY[:8], False),  # too few to define a deviation
        (1.0, STEADY, False),  # a falling loss is no spike
        (9.0, [math.nan] * 60, False),
    ],
)
def test_is_spike(value, history, expected):
    assert is_spike(value, history, SpikeConfig()) is expected


def test_stop_ends_on_a_non_finite_loss_and_names_the_step():
    with pytest.raises(TrainingError, match=r"step 64: loss nan.*optim\.lr"):
        feed(SpikeGuard(SpikeConfig(), rollback=lambda run: None), FakeRun(), [*STEADY, math.nan])


def test_stop_only_reports_a_finite_spike():
    run = FakeRun()
    feed(SpikeGuard(SpikeConfig(), rollback=lambda run: None), run, [*STEADY, 50.0, 2.0])
    assert [(name, details["at"]) for name, details in run.events] == [("spike", 64)]


def test_skip_consults_the_norm_before_the_update_and_is_bounded():
    run = FakeRun()
    guard = SpikeGuard(SpikeConfig(action="skip", max_events=2), rollback=lambda run: None)
    guard.on_start(run)
    feed(guard, run, STEADY)
    assert run.skip_if(100.0) is True
    assert run.skip_if(1.01) is False
    before = list(run.state.grad_norms)
    with pytest.raises(TrainingError, match="max_events = 2"):
        feed(guard, run, [2.0] * 3, norms=[100.0] * 3, skipped=True)
    assert run.state.grad_norms == before[1:], "a skipped step must not widen the band"
    assert run.state.spike_events == 3


def test_rollback_runs_after_a_skipped_update():
    called = []
    guard = SpikeGuard(SpikeConfig(action="rollback"), rollback=called.append)
    run = FakeRun()
    guard.on_step(run, SimpleNamespace(metrics=SimpleNamespace(skipped=False)))
    assert called == []
    guard.on_step(run, SimpleNamespace(metrics=SimpleNamespace(skipped=True)))
    assert called == [run]


def test_resume_guard_lets_a_continued_run_pass():
    feed(ResumeGuard(STEADY, []), FakeRun(), [2.01, 2.05, 1.9, 2.0, 2.1, 9.0])  # after five steps it no longer judges


def test_resume_guard_names_what_differs():
    with pytest.raises(TrainingError, match=r"loss 3\.1.*data fingerprint was 'a' and is 'b'.*resume_guard=false"):
        feed(ResumeGuard(STEADY, ["data fingerprint was 'a' and is 'b'"]), FakeRun(), [2.0, 3.1])


def test_differences_are_found_in_nested_dicts():
    saved = {"optim": {"lr": 1e-3, "name": "adamw"}, "seed": 1}
    current = {"optim": {"lr": 2e-3, "name": "adamw"}, "seed": 1, "new": True}
    assert describe_differences(saved, current) == ["new was None and is True", "optim.lr was 0.001 and is 0.002"]
