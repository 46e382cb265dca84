"""How many samples each step takes and where they begin: integers only, so that a resume is arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

from data_tools.errors import UserError
from mamba_pretrain.training.config import TrainConfig


@dataclass(frozen=True)
class BatchSchedule:
    """The global batch size of every step. ``stages`` holds (first step, samples a step), ascending, the last one open-ended."""

    stages: tuple[tuple[int, int], ...]

    @classmethod
    def build(cls, config: TrainConfig, sequence_length: int, quantum: int) -> BatchSchedule:
        """From the config; every stage must be a multiple of ``quantum`` (world size x micro-batch), else UserError."""
        full = config.global_batch_size or max(1, round((config.global_batch_tokens or 0) / sequence_length))
        stages = [(0, full)]
        if ramp := config.batch_ramp:
            sizes = [*range(ramp.start, full, ramp.increment), full]
            stages = [(round(i * ramp.steps / max(1, len(sizes) - 1)), size) for i, size in enumerate(sizes)]
        for _, size in stages:
            if size % quantum:
                nearest = max(quantum, round(size / quantum) * quantum)
                raise UserError(
                    f"the global batch of {size} sequences is not divisible by world size x train.micro_batch_size = {quantum}; "
                    f"set train.global_batch_size={nearest} or change train.micro_batch_size"
                )
        return cls(tuple(stages))

    def size(self, step: int) -> int:
        """Samples of step ``step`` (0-based)."""
        return next(size for first, size in reversed(self.stages) if step >= first)

    def first_sample(self, step: int) -> int:
        """Global index of the first sample of step ``step``: all samples before it."""
        total = 0
        for (first, size), end in zip(self.stages, [*(first for first, _ in self.stages[1:]), step], strict=True):
            total += max(0, min(end, step) - first) * size
        return total

    def steps_for(self, samples: int) -> int:
        """The fewest steps that take at least ``samples`` samples."""
        low, high = 1, 1
        while self.first_sample(high) < samples:
            high *= 2
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self.first_sample(middle) >= samples else (middle + 1, high)
        return low


def total_steps(config: TrainConfig, schedule: BatchSchedule, sequence_length: int) -> int:
    """Steps of the whole run, from ``steps`` or ``tokens``."""
    if config.steps is not None:
        return config.steps
    assert config.tokens is not None
    return schedule.steps_for(-(-config.tokens // sequence_length))
