"""Copies state to host memory while training goes on: only the next update of the weights has to wait for the copy.

On a GPU the copies run on a stream of their own and the update waits for them on the device; on a CPU a background thread copies.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

import torch
from torch import Tensor

from mamba_pretrain.parallel.portable import Segment

# Elements allocated at once. Pinning costs milliseconds per call, and pinned memory is handed out in powers of two.
CHUNK = 1 << 27


class StagingBuffers:
    """Host memory kept from save to save: fresh memory costs a page fault per 4 KB, pinned memory much more."""

    def __init__(self) -> None:
        self._layout: list[tuple[str, int, int]] = []
        self._targets: list[Tensor] = []
        self._stream: torch.cuda.Stream | None = None

    def begin(self, segments: list[Segment]) -> StagedCopy:
        """Starts copying; the originals must not change before ``StagedCopy.before_update`` has returned."""
        on_gpu = any(segment.data.is_cuda for segment in segments)
        layout = [(segment.name, segment.offset, segment.data.numel()) for segment in segments]
        if layout != self._layout:
            self._layout, self._targets = layout, list(allocate([size for *_, size in layout], on_gpu))
        if on_gpu and self._stream is None:
            self._stream = torch.cuda.Stream()
        return StagedCopy(segments, self._targets, self._stream if on_gpu else None)


def allocate(sizes: list[int], pinned: bool) -> Iterator[Tensor]:
    """An fp32 tensor of each size (1-D), cut from few large allocations."""
    room, left = torch.empty(0), sum(sizes)
    for size in sizes:
        if room.numel() < size:
            room = torch.empty(max(size, min(CHUNK, left)), dtype=torch.float32, pin_memory=pinned)
        yield room[:size]
        room, left = room[size:], left - size


class StagedCopy:
    """A copy under way."""

    def __init__(self, segments: list[Segment], targets: list[Tensor], stream: torch.cuda.Stream | None) -> None:
        self._segments = segments
        self._targets = targets
        self._done = threading.Event()
        self._event: torch.cuda.Event | None = None
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._copy()
                self._event = stream.record_event()

    def _copy(self) -> None:
        for segment, target in zip(self._segments, self._targets, strict=True):
            target.copy_(segment.data.detach(), non_blocking=True)

    def before_update(self) -> None:
        """The original may change once this has returned (on a GPU: what is queued after it may change it)."""
        if self._event is not None:
            torch.cuda.current_stream().wait_event(self._event)
        else:
            self._done.wait()

    def finish(self) -> list[Segment]:
        """Completes the copy, in the background thread; returns the segments in host memory."""
        try:
            if self._event is not None:
                self._event.synchronize()
            else:
                self._copy()
        finally:
            self._done.set()
        return [Segment(s.name, s.shape, s.offset, target) for s, target in zip(self._segments, self._targets, strict=True)]
