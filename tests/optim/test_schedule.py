import math

import pytest

from mamba_pretrain.optim.config import OptimConfig, ScheduleConfig
from mamba_pretrain.optim.schedule import learning_rate, warmup_steps

PEAK, TOTAL = 1e-3, 100


def curve(**options):
    config = ScheduleConfig(**options)
    return [learning_rate(config, PEAK, TOTAL, step) for step in range(TOTAL)]


@pytest.mark.parametrize("name", ["cosine", "wsd", "linear", "constant"])
def test_warmup_is_linear_and_reaches_the_peak_on_its_last_step(name):
    rates = curve(name=name, warmup_steps=10)
    assert rates[:10] == pytest.approx([PEAK * (i + 1) / 10 for i in range(10)])
    assert max(rates) == pytest.approx(PEAK)


@pytest.mark.parametrize("name", ["cosine", "wsd", "linear"])
def test_last_step_has_the_minimum(name):
    assert curve(name=name, min_lr=1e-5)[-1] == pytest.approx(1e-5)


def test_cosine_is_half_way_in_the_middle():
    rates = curve(name="cosine", warmup_steps=0, min_lr=0.0)
    middle = 0.5 * (rates[49] + rates[50])
    assert middle == pytest.approx(PEAK / 2, rel=1e-6)
    assert rates[25] == pytest.approx(PEAK * 0.5 * (1 + math.cos(math.pi * 25 / 99)))


def test_wsd_holds_the_peak_until_the_decay():
    rates = curve(name="wsd", warmup_steps=10, decay_fraction=0.2, decay_shape="linear", min_lr=0.0)
    assert rates[10:81] == pytest.approx([PEAK] * 71)
    assert rates[81] < PEAK
    assert rates == sorted(rates[:10]) + sorted(rates[10:], reverse=True)


def test_steps_past_the_end_keep_the_final_rate_and_zero_warmup_works():
    config = ScheduleConfig(name="linear", warmup_fraction=0.0, min_lr=1e-5)
    assert warmup_steps(config, TOTAL) == 0
    assert learning_rate(config, PEAK, TOTAL, 0) == PEAK
    assert learning_rate(config, PEAK, TOTAL, 10 * TOTAL) == pytest.approx(1e-5)


def test_a_minimum_above_the_peak_is_refused():
    with pytest.raises(ValueError, match="min_lr"):
        OptimConfig(lr=1e-6, schedule=ScheduleConfig(min_lr=1e-5))
