"""Learning-rate schedules as pure functions of the step: nothing to save, nothing to replay."""

from __future__ import annotations

import math
from collections.abc import Callable

from mamba_pretrain.optim.config import ScheduleConfig


def warmup_steps(config: ScheduleConfig, total_steps: int) -> int:
    """Steps of warm-up in a run of ``total_steps``."""
    return config.warmup_steps if config.warmup_steps is not None else round(config.warmup_fraction * total_steps)


def _cosine(progress: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * progress))


_DECAYS: dict[str, Callable[[float], float]] = {
    "linear": lambda progress: 1.0 - progress,
    "sqrt": lambda progress: 1.0 - math.sqrt(progress),
    "cosine": _cosine,
}


def learning_rate(config: ScheduleConfig, peak: float, total_steps: int, step: int) -> float:
    """The learning rate of step ``step`` (0-based) of ``total_steps``.

    Linear warm-up reaches ``peak`` at the last warm-up step; the decay ends at ``config.min_lr`` on the last step. ``wsd`` (warm-up,
    stable, decay; MiniCPM, arXiv:2404.06395) holds the peak until the last ``decay_fraction`` of the run. Steps past the end keep
    the final rate.
    """
    warmup = warmup_steps(config, total_steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    if config.name == "constant":
        return peak
    start = warmup if config.name != "wsd" else max(warmup, total_steps - round(config.decay_fraction * total_steps))
    if step < start:
        return peak
    # The last step, not the one after it, has the final rate: progress is 0 at `start` and 1 at `total_steps - 1`.
    progress = min(1.0, (step - start) / max(1, total_steps - 1 - start))
    shape = config.decay_shape if config.name == "wsd" else config.name
    return config.min_lr + (peak - config.min_lr) * _DECAYS[shape](progress)
