"""A micro-batch's forward and backward pass recorded once per shape as one CUDA graph and replayed.

A training step launches thousands of kernels, and from Python that takes longer than a small model's kernels take to run. A replay is one
launch. It reads its batch from fixed buffers and leaves its gradients in fixed buffers, and it runs the very kernels that were recorded, the
collectives of sharded training among them: results are those of the pass that launches them one by one.

Both passes are one recording: what sharded training gathers and frees between them is then ordered inside the graph.

What is recorded must not wait for the device or look at its values; whether anything does is found out by recording. If that fails in one
process, a warning says why and training goes on launch by launch. Of several processes one may fail alone, so there it is an error.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from data_tools.errors import UserError

if TYPE_CHECKING:
    from mamba_pretrain.data.batch import Batch

log = logging.getLogger(__name__)

# Every further shape holds memory of its own for its batch and its graph; training has one shape, and a run that has many is better off without.
MAX_SHAPES = 4
_INPUTS = ("tokens", "labels", "seq_idx", "positions")

Replay = Callable[[], None]
# Shape of the batch, whether the graph overwrites the gradients (or adds to them), and whether it is recorded as a step's last pass.
Key = tuple[tuple[int, ...], bool, bool]


class Recorder(Protocol):
    """Records what a function launches."""

    def record(self, work: Callable[[], None]) -> Replay:
        """Calls ``work`` without running the kernels that it launches; the result runs them, on the memory that ``work`` saw."""

    def has_room(self, share: float) -> bool:
        """Whether the device has memory for work launched beside recordings that needs this share of what they hold."""

    def forget(self) -> None:
        """Gives up the memory of all recordings."""


class CudaRecorder:
    """Records CUDA graphs that share one pool of memory: they run one after another, each pass complete before the next begins."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._held = 0

    def record(self, work: Callable[[], None]) -> Replay:
        """See ``Recorder.record``."""
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._device)
        torch.cuda.synchronize(self._device)
        gc.collect()  # also so that none happens in the middle, where memory cannot be given back
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved(self._device)
        try:
            # `thread_local`: threads that load data and write checkpoints go on calling CUDA meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                work()
        except BaseException:
            # A recording that is cut off leaves its stream behind, and a random generator that believes it is still being recorded.
            torch.cuda.set_stream(current)
            generator = torch.cuda.default_generators[torch.cuda.current_device()]
            generator.graphsafe_set_state(generator.clone_state())
            raise
        self._held += max(0, torch.cuda.memory_reserved(self._device) - before)
        return graph.replay

    def has_room(self, share: float) -> bool:
        """See ``Recorder.has_room``."""
        needed = share * self._held
        if torch.cuda.mem_get_info(self._device)[0] < needed:
            torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self._device)[0] >= needed

    def forget(self) -> None:
        """See ``Recorder.forget``."""
        torch.cuda.synchronize(self._device)
        self._pool, self._held = torch.cuda.graph_pool_handle(), 0
        torch.cuda.empty_cache()


@dataclass(eq=False)
class _Recording:
    """One shape's batch, and what runs its passes."""

    batch: Batch
    replay: Replay


class MicroBatchGraphs:
    """Runs micro-batches by recordings wherever it can; where it cannot, ``loss`` and ``backward`` say so and the caller launches.

    A shape's first step is launched, which compiles and tunes kernels. A step either begins with a recording or is launched as a whole: only at
    its first micro-batch, when no parameter has a gradient, may gradients be overwritten. Between steps parameters have no gradient, as
    without recordings; the buffers are handed to them again when they are filled.
    """

    def __init__(
        self,
        run: Callable[[Batch, Tensor, bool], Tensor],
        parameters: Sequence[nn.Parameter],
        device: torch.device,
        recorder: Recorder,
        alone: bool = True,
    ) -> None:
        """``run(batch, divisor, last)`` launches both passes of a batch and returns its loss; ``parameters``: all that get a gradient;
        ``alone``: no other process waits for this one, so that a recording may fail."""
        self._run = run
        self._alone = alone
        self._parameters = list(parameters)
        self._device = device
        self._recorder = recorder
        self._divisor, self._loss = (torch.ones((), dtype=torch.float32, device=device) for _ in range(2))
        self._recordings: dict[Key, _Recording] = {}
        self._batches: dict[tuple[int, ...], Batch] = {}
        self._gradients: list[Tensor | None] | None = None
        # Shape, and place in a step, of the graph that made the gradients' buffers.
        self._overwriting: tuple[tuple[int, ...], bool] | None = None
        self._launched: set[tuple[int, ...]] = set()  # shapes of this step
        self._ready: set[tuple[int, ...]] = set()  # shapes of earlier steps, whose kernels are compiled and tuned
        self._pending: tuple[_Recording, Tensor] | None = None
        self.failed: str | None = None

    def loss(self, batch: Batch, last: bool, launch: bool = False) -> Tensor | None:
        """The loss of a micro-batch, not a number until ``backward`` has run its recording; None if it must be launched. ``launch``: asks
        for that."""
        self._pending = None
        if self.failed is not None:
            return None
        shape = tuple(batch.tokens.shape)
        begun = self._accumulated()
        if launch or self._launched or shape not in self._ready:
            if not begun:
                self.make_room(1.0)
            self._launched.add(shape)
            return None
        if not begun and self._overwriting not in (None, (shape, last)):
            self._clear_gradients()
            begun = True
        try:
            recording = self._recording(shape, not begun, last)
        except Exception as error:  # whatever a library does that a recording does not allow
            self._give_up(error)
            return None
        for name in _INPUTS:
            getattr(recording.batch, name).copy_(getattr(batch, name), non_blocking=True)
        loss = torch.full_like(self._loss, float("nan"))
        self._pending = recording, loss
        return loss

    def backward(self, loss: Tensor, divisor: Tensor) -> bool:
        """Computes ``loss`` and adds its gradient, if it is the last that ``loss`` gave, as it must be."""
        pending, self._pending = self._pending, None
        if pending is None or pending[1] is not loss:
            if loss.requires_grad:
                return False
            raise RuntimeError("the backward pass of a recorded micro-batch must follow its forward pass at once, and only once")
        self._divisor.copy_(divisor)
        pending[0].replay()
        loss.copy_(self._loss)  # which the next replay overwrites
        self._hand_out()
        return True

    def step_done(self) -> None:
        """After an update: what this step launched may be recorded from now on."""
        self._ready |= self._launched
        self._launched.clear()

    def close(self) -> None:
        """Gives up all recordings, and whatever those hold, for good."""
        self.failed = self.failed or "closed"
        self._recordings.clear()

    # -- gradients

    def _accumulated(self) -> bool:
        """Whether this step has gradients already."""
        return bool(self._launched) or any(p.grad is not None for p in self._parameters)

    def _hand_out(self) -> None:
        assert self._gradients is not None
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient

    def _clear_gradients(self) -> None:
        assert self._gradients is not None
        torch._foreach_zero_([g.to_local() if isinstance(g, DTensor) else g for g in self._gradients if g is not None])
        self._hand_out()

    # -- recording

    def _recording(self, shape: tuple[int, ...], overwrite: bool, last: bool) -> _Recording:
        key = shape, overwrite, last
        if key not in self._recordings:
            if shape not in self._batches and len(self._batches) >= MAX_SHAPES:
                raise ValueError(f"there are batches of more than {MAX_SHAPES} shapes")
            self._recordings[key] = self._record(self._static_batch(shape), overwrite, last)
            if overwrite:
                self._overwriting = shape, last
                log.info("CUDA graphs: recorded forward and backward pass of micro-batches of %s tokens", " x ".join(map(str, shape)))
        return self._recordings[key]

    def _static_batch(self, shape: tuple[int, ...]) -> Batch:
        if shape not in self._batches:
            from mamba_pretrain.data.batch import empty_batch

            empty = empty_batch(*shape)
            self._batches[shape] = empty.map(lambda t: t.to(self._device).clone())
        return self._batches[shape]

    def _record(self, batch: Batch, overwrite: bool, last: bool) -> _Recording:
        def work() -> None:
            # Views: what is remembered by tensor (documents' numbers) is then computed in every recording, and by every replay.
            self._loss.copy_(self._run(batch.map(lambda t: t.view_as(t)), self._divisor, last))

        replay = self._recorder.record(work)
        if overwrite:
            # Recorded with no gradients there, the backward pass makes them, in memory that stays theirs as long as these are kept.
            self._gradients = [p.grad for p in self._parameters]
            for parameter in self._parameters:
                parameter.grad = None
        return _Recording(batch, replay)

    # -- ways out

    def make_room(self, share: float) -> None:
        """Before launched work that needs this share of a training pass's memory: beside the recordings' it may be more than the device holds.

        Only between steps. Whether it gives recordings up is this process's own affair: recording them again runs nothing.
        """
        if self._recordings and not self._recorder.has_room(share):
            log.info("CUDA graphs: given up for work that must be launched, for want of memory; they will be recorded again")
            self._forget()

    def _give_up(self, error: Exception) -> None:
        first: BaseException = error  # what broke the recording off; ending it raises an error of its own, which says less
        while first.__context__ is not None:
            first = first.__context__
        self.failed = f"{type(first).__name__}: {' '.join(str(first).split())[:300]}"
        if not self._alone:
            raise UserError(
                f"the training step could not be recorded as a CUDA graph ({self.failed}), and other processes wait for this one; "
                "set parallel.cuda_graphs=off and start again"
            ) from error
        log.warning(
            "CUDA graphs cannot be used (%s); kernels are launched one by one, which is slower and gives the same results", self.failed
        )
        kept = self._gradients is not None and any(
            p.grad is g for p, g in zip(self._parameters, self._gradients, strict=True) if g is not None
        )
        if not kept:
            for parameter in self._parameters:
                parameter.grad = None  # of a recording that was cut off: nothing has been computed
        self._forget()

    def _forget(self) -> None:
        self._recordings.clear()
        self._batches.clear()
        self._gradients = self._overwriting = None
        self._recorder.forget()
