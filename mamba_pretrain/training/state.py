"""Where a run stands: the integers a checkpoint carries besides the tensors."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

HISTORY = 64  # recent losses kept for the resume guard and the spike guard


@dataclass
class TrainState:
    """Progress after ``step`` optimizer steps.

    ``skipped_samples`` counts samples passed over by rollbacks: data position = samples of all steps + skipped_samples.
    """

    step: int = 0
    tokens: int = 0
    skipped_samples: int = 0
    restarts: int = 0
    spike_events: int = 0
    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)

    def remember(self, loss: float, grad_norm: float) -> None:
        """Appends to the bounded history."""
        for history, value in ((self.losses, loss), (self.grad_norms, grad_norm)):
            history.append(value)
            del history[:-HISTORY]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for the checkpoint's manifest."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> TrainState:
        """The state saved by ``to_dict``."""
        return cls(**data)
