import pytest

from data_tools.errors import UserError
from mamba_pretrain.training.batch_schedule import BatchSchedule, total_steps
from mamba_pretrain.training.config import BatchRamp, TrainConfig


def build(quantum=1, length=128, **options):
    config = TrainConfig(**{"steps": 100, "global_batch_size": 64, **options})
    return config, BatchSchedule.build(config, length, quantum)


def test_without_a_ramp_every_step_takes_the_same_number_of_samples():
    _, schedule = build()
    assert [schedule.size(step) for step in (0, 1, 99)] == [64, 64, 64]
    assert schedule.first_sample(10) == 640


def test_ramp_grows_in_stages_and_first_sample_is_the_sum_of_sizes():
    _, schedule = build(batch_ramp=BatchRamp(start=16, increment=16, steps=30))
    sizes = [schedule.size(step) for step in range(40)]
    assert sizes[0] == 16
    assert sizes[30:] == [64] * 10
    assert sizes == sorted(sizes)
    assert set(sizes) == {16, 32, 48, 64}
    assert [schedule.first_sample(step) for step in range(41)] == [sum(sizes[:step]) for step in range(41)]


def test_tokens_are_rounded_up_to_whole_steps():
    config, schedule = build(steps=None, tokens=128 * 64 * 3 + 1)
    assert total_steps(config, schedule, 128) == 4
    assert schedule.steps_for(64 * 3) == 3


def test_tokens_with_a_ramp_take_more_steps():
    config, schedule = build(steps=None, tokens=128 * 640, batch_ramp=BatchRamp(start=32, increment=32, steps=10))
    steps = total_steps(config, schedule, 128)
    assert schedule.first_sample(steps) >= 640 > schedule.first_sample(steps - 1)


def test_global_batch_tokens_is_rounded_to_sequences():
    _, schedule = build(global_batch_size=None, global_batch_tokens=500_000, length=2048)
    assert schedule.size(0) == 244


@pytest.mark.parametrize("options", [{}, {"batch_ramp": BatchRamp(start=10, increment=54, steps=10)}])
def test_an_indivisible_batch_names_the_nearest_that_fits(options):
    with pytest.raises(UserError, match=r"not divisible .*global_batch_size=\d+"):
        build(quantum=24 if not options else 16, **options)


def test_exactly_one_of_steps_and_tokens():
    with pytest.raises(ValueError, match="exactly one of steps and tokens"):
        TrainConfig(global_batch_size=1)
    with pytest.raises(ValueError, match="exactly one of global_batch_size"):
        TrainConfig(steps=1, global_batch_size=1, global_batch_tokens=5)
