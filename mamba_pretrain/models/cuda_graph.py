"""A decoding step recorded once and replayed: at one token a step, launching kernels costs more than running them."""

from __future__ import annotations

from collections.abc import Callable

import torch


def recorded(step: Callable[[], None]) -> Callable[[], None]:
    """What replays everything that ``step`` launches, on the buffers that it uses; recording runs none of it. CUDA only.

    ``step`` must have run a few times before: kernels are compiled and tuned at first use, and must neither be then.
    """
    graph = torch.cuda.CUDAGraph()
    # `thread_local`: threads that write checkpoints go on calling CUDA meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        step()
    return graph.replay
