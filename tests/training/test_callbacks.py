"""What callbacks do that no run of the loop shows."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace
from typing import Any

from mamba_pretrain.training.callbacks import CollectGarbage


class Cycle:
    """Freed by the collector only."""

    def __init__(self) -> None:
        self.me = self


def test_garbage_is_collected_behind_the_first_step_and_then_when_due():
    callback, run = CollectGarbage(every_steps=4), SimpleNamespace()
    assert gc.isenabled()
    callback.on_start(run)  # type: ignore[arg-type]
    try:
        assert not gc.isenabled()
        alive = []
        for step in range(6, 10):  # resumed at step 5
            left: Any = weakref.ref(Cycle())
            callback.on_step(run, SimpleNamespace(step=step))  # type: ignore[arg-type]
            alive.append(left() is not None)
        assert alive == [False, True, False, True]
    finally:
        callback.on_exit(run)  # type: ignore[arg-type]
    assert gc.isenabled()
