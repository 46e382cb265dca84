"""Times of kernels without what it takes to launch them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def replayed_ms(run: Callable[[], Any], repeat_ms: int = 100) -> float:
    """Milliseconds of a run inside a CUDA graph of about ``repeat_ms`` of runs; the median of ten replays.

    ``run`` may return a graph of autograd's only if nothing else keeps it: one that lives on ties its leaves to the stream it was made on, and a
    recording may not wait for another.
    """
    from triton.testing import do_bench_cudagraph

    with torch.cuda.stream(torch.cuda.Stream()):
        return float(do_bench_cudagraph(run, rep=repeat_ms, return_mode="median"))


def both_passes_ms(forward: Callable[[], Any], both: Callable[[], Any]) -> dict[str, float]:
    """Of the forward pass, of the backward pass (both less forward), and of both."""
    alone, together = replayed_ms(forward), replayed_ms(both)
    return {"forward_ms": alone, "backward_ms": together - alone, "both_ms": together}
