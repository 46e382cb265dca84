"""What a block keeps for its backward pass, and what it needs on top while it runs: counted by running the real code on fake tensors.

Nothing is computed and nothing is allocated, so a block of a 7B model at length 100,000 is measured in a fraction of a second on a laptop.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import CheckpointPolicy, checkpoint

from mamba_pretrain.models.block import Block
from mamba_pretrain.models.boundaries import Boundaries
from mamba_pretrain.models.config import ModelConfig
from mamba_pretrain.models.fp8 import use_fp8
from mamba_pretrain.parallel.recompute import KEPT, checkpoint_options, policy_of
from mamba_pretrain.planning import kernels


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that ops create and that are still referenced: now and at the peak."""

    def __init__(self, existing: Iterable[Tensor] = ()) -> None:
        """``existing`` tensors, and views of them, do not count."""
        super().__init__()
        self.now = 0
        self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in existing}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the op and notes new storages among its results."""
        result = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._note, result)
        return result

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        weakref.finalize(storage, self._release, key, size)
        self.now += size
        self.peak = max(self.peak, self.now)

    def _release(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


@dataclass(frozen=True)
class BlockCost:
    """Bytes of one block for one micro-batch.

    ``saved``: kept from its forward to its backward pass. ``forward``, ``backward``: the most that exists at once during the pass, beyond
    what was saved when it began; ``backward`` includes the block's own weight gradients.
    """

    saved: float
    forward: float
    backward: float

    def at(self, other: BlockCost, batch: int) -> BlockCost:
        """The cost at ``batch`` sequences, from those at one (self) and two (other): all sizes are linear in the batch."""
        return BlockCost(
            *(
                a + (b - a) * (batch - 1)
                for a, b in ((self.saved, other.saved), (self.forward, other.forward), (self.backward, other.backward))
            )
        )


def block_cost(config: ModelConfig, mixer: str, batch: int, length: int, options: Options) -> BlockCost:
    """The cost of one block; cached, and interpolated from batches of one and two sequences."""
    one, two = (_measure(config.model_dump_json(), mixer, b, length, options) for b in (1, 2))
    return one.at(two, batch)


@dataclass(frozen=True)
class Options:
    """How blocks are run.

    ``compute``: autocast dtype, None for plain fp32. ``recompute``: none, selective, projections or block, as parallel.activation_checkpointing.
    ``fused``: GPU kernels (their stand-ins), not this machine's reference implementations. ``packed``: document boundaries are given.
    ``fp8``: as precision.fp8.
    """

    compute: torch.dtype | None = torch.bfloat16
    recompute: str = "none"
    fused: bool = True
    packed: bool = True
    fp8: str = "off"


@functools.lru_cache(maxsize=512)
def _measure(config_json: str, mixer: str, batch: int, length: int, options: Options) -> BlockCost:
    config = ModelConfig.model_validate_json(config_json)
    with _quiet(), FakeTensorMode(), kernels.stand_ins() if options.fused else contextlib.nullcontext():
        block = Block(config, mixer)
        if options.fp8 != "off":
            use_fp8(block, options.fp8)
        return measure_block(block, config.d_model, batch, length, options)


def measure_block(block: nn.Module, d_model: int, batch: int, length: int, options: Options) -> BlockCost:
    """Runs ``block`` forward and backward, on fake or real tensors, and counts."""
    dtype = options.compute or torch.float32
    boundaries = Boundaries(torch.zeros(batch, length, dtype=torch.int32), torch.zeros(batch, length, dtype=torch.int64))
    leaves = torch.zeros(batch, length, d_model, dtype=dtype), torch.zeros(batch, length, d_model)
    for leaf in leaves:
        leaf.requires_grad_()
    shared = (boundaries.seq_idx, boundaries.positions, boundaries.attention_mask)  # of the batch, for all blocks
    with LiveBytes([*block.parameters(), *leaves, *shared]) as live:
        # As in the middle of a model: inputs that nobody but the block keeps, outputs that live on only where they are kept. Where results of
        # projections are kept, the hidden state is one that the block before keeps.
        hidden = leaves[0] if options.recompute in KEPT else leaves[0] * 1
        residual = leaves[1] * 1
        start = live.now
        with torch.autocast("cpu", dtype, enabled=options.compute is not None):
            arguments = (hidden, residual, boundaries if options.packed else None)
            del hidden, residual
            end = _run(block, arguments, options.recompute)
            del arguments
        forward, kept = live.peak - start, live.now
        live.peak = live.now
        end.backward()
    return BlockCost(float(kept), float(forward), float(live.peak - kept))


def _run(block: nn.Module, arguments: tuple[Any, ...], recompute: str) -> Tensor:
    if recompute == "none":
        return _End.apply(*block(*arguments))
    return _End.apply(*checkpoint(block, *arguments, **checkpoint_options(recompute, _policy(recompute))))


def _policy(mode: str) -> Callable[..., CheckpointPolicy]:
    """As parallel/recompute.py; what the stand-in of a scan allocates as its result is what the scan's operator returns."""
    real = policy_of(mode)

    def policy(context: Any, operation: Any, *arguments: Any, **named: Any) -> CheckpointPolicy:
        if mode == "selective" and kernels.is_scan_result(operation):
            return CheckpointPolicy.MUST_SAVE
        return real(context, operation, *arguments, **named)

    return policy


class _End(torch.autograd.Function):
    """Ends the graph behind a block: keeps nothing and hands fresh gradients back."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, residual: Tensor) -> Tensor:
        ctx.like = [(t.shape, t.dtype) for t in (hidden, residual)]
        return torch.zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty(shape, dtype=dtype) for shape, dtype in ctx.like)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Choices of implementations made on fake tensors are nobody's business."""
    logger = logging.getLogger("mamba_pretrain.ops.registry")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
