"""Memory of one GPU by part, as a timeline over one training step; the peak is the largest moment of it.

GB are 1e9 bytes of live tensors, which is what ``torch.cuda.max_memory_allocated`` reports. The allocator's fragmentation and the CUDA
context come on top (``Memory.needed``).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from mamba_pretrain.models.config import ModelConfig
from mamba_pretrain.models.fp8 import cast_projections
from mamba_pretrain.models.language_model import LanguageModel
from mamba_pretrain.ops.cross_entropy import CHUNK_ELEMENTS
from mamba_pretrain.parallel.zero_config import bucket_elements
from mamba_pretrain.planning.activations import BlockCost, Options, block_cost

STRATEGIES = ("single", "ddp", "fsdp2", "hsdp", "zero1", "zero2", "zero3")
FP32, BF16, FP8 = 4, 2, 1
ADAM_MOMENTS = 2 * FP32
# cuBLAS takes its workspaces (32 MiB, and as much again for cuBLASLt) from torch's allocator, where they count as live.
LIBRARY_BYTES = 2 * (32 << 20)
BATCH_BYTES = 2 * (8 + 8 + 4 + 8)  # tokens, labels, seq_idx, positions of this and the next micro-batch, per token
# What a GPU needs beyond live tensors: CUDA context, NCCL buffers and libraries in bytes, and fragmentation as a share of the peak.
CONTEXT_BYTES, FRAGMENTATION = 1.2e9, 0.04


@dataclass(frozen=True)
class Sharding:
    """How an engine spreads a model over ``world`` ranks; ``shard`` of them share one copy of what is sharded."""

    strategy: str
    world: int = 1
    shard: int = 1

    @property
    def parameter_share(self) -> float:
        """Share of the weights a rank stores."""
        return 1 / self.shard if self.strategy in ("fsdp2", "hsdp", "zero3") else 1.0

    @property
    def gradient_share(self) -> float:
        """Share of the gradients a rank keeps after reduction."""
        return 1 / self.shard if self.strategy in ("fsdp2", "hsdp", "zero2", "zero3") else 1.0

    @property
    def optimizer_share(self) -> float:
        """Share of the optimizer's state."""
        return 1 / self.shard if self.strategy not in ("single", "ddp") else 1.0


def sharding(strategy: str, gpus: int, shard_size: int = 8) -> Sharding:
    """The sharding of a strategy on so many GPUs; HSDP shards inside groups of ``shard_size`` and replicates between them."""
    return Sharding(strategy, gpus, min(gpus, shard_size) if strategy == "hsdp" else gpus)


@dataclass(frozen=True)
class Shape:
    """Parameters of a model in the groups that the timeline needs."""

    total: int
    embedding: int  # rows x d_model, once
    tied: bool
    blocks: tuple[int, ...]
    # Of a block's parameters those that autocast casts, and of these those that it casts beside FP8.
    cast: tuple[int, ...]
    cast_beside_fp8: tuple[int, ...]

    @classmethod
    def of(cls, model: LanguageModel) -> Shape:
        """From a model on the meta device."""
        blocks = tuple(sum(p.numel() for p in block.parameters()) for block in model.blocks())
        cast, beside_fp8 = (
            tuple(sum(m.weight.numel() for m in cast_projections(block, fp8)) for block in model.blocks()) for fp8 in (False, True)
        )
        embedding = model.config.padded_vocab_size * model.config.d_model
        return cls(model.n_parameters(), embedding, model.config.tie_word_embeddings, blocks, cast, beside_fp8)


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU. ``parts`` add up to ``peak``; ``moment`` says when that is; ``activations`` by layer type is part of it."""

    parts: dict[str, float]
    moment: str
    by_mixer: dict[str, float] = field(default_factory=dict)

    @property
    def peak(self) -> float:
        """Live bytes at the worst moment."""
        return sum(self.parts.values())

    @property
    def needed(self) -> float:
        """Bytes of device memory to have: the peak, fragmentation, context and libraries."""
        return self.peak * (1 + FRAGMENTATION) + CONTEXT_BYTES


def estimate(
    config: ModelConfig,
    shape: Shape,
    split: Sharding,
    micro_batch: int,
    length: int,
    accumulation: int = 1,
    options: Options | None = None,
    moments_bytes: float = ADAM_MOMENTS,
    replayed: bool = False,
) -> Memory:
    """The worst moment of a training step.

    ``accumulation``: micro-batches per step; with more than one, gradients already exist during the forward pass. ``moments_bytes``:
    optimizer state per parameter (AdamW 8, 8-bit AdamW about 2). ``replayed``: from CUDA graphs, which sum gradients over
    processes with every micro-batch.
    """
    options = options or Options()
    costs: dict[str, BlockCost] = {mixer: block_cost(config, mixer, micro_batch, length, options) for mixer in set(config.layer_mixers)}
    timeline = _Timeline(config, shape, split, costs, micro_batch, length, accumulation > 1, replayed, options, moments_bytes)
    worst = max(timeline.moments(), key=lambda moment: moment.peak)
    by_mixer: dict[str, float] = {}
    for mixer, cost in zip(config.layer_mixers, timeline.costs, strict=True):
        by_mixer[mixer] = by_mixer.get(mixer, 0.0) + cost.saved
    return Memory(worst.parts, worst.moment, by_mixer)


class _Timeline:
    """The moments of a step at which memory can peak."""

    def __init__(
        self,
        config: ModelConfig,
        shape: Shape,
        split: Sharding,
        costs: dict[str, BlockCost],
        micro_batch: int,
        length: int,
        accumulating: bool,
        replayed: bool,
        options: Options,
        moments_bytes: float,
    ) -> None:
        mixed = options.compute is not None
        self.config, self.shape, self.split, self.tokens = config, shape, split, micro_batch * length
        self.compute_bytes, self.fused = BF16 if mixed else FP32, options.fused
        self.costs = [costs[mixer] for mixer in config.layer_mixers]
        self.gathers = split.strategy in ("fsdp2", "hsdp") and split.world > 1
        # One process and DDP keep bf16 copies of projections and head from step to step (``torch_engine.keeps_copies``).
        whole = split.strategy in ("single", "ddp") or (split.strategy == "fsdp2" and split.world == 1)
        self.keeps_copies = mixed and whole and options.recompute == "none"
        kept = shape.cast if options.fp8 == "off" else shape.cast_beside_fp8
        if self.keeps_copies:  # and no pass makes any
            self.costs = [replace(c, saved=c.saved - BF16 * n, forward=c.forward - BF16 * n) for c, n in zip(self.costs, kept, strict=True)]
        elif mixed and self.gathers and options.recompute == "none":
            # Projections keep bf16 copies of their weights, or FP8 ones; FSDP2 frees its gathered ones after the block's forward pass.
            copied = BF16 if options.fp8 == "off" else FP8
            self.costs = [replace(c, saved=max(0.0, c.saved - copied * n)) for c, n in zip(self.costs, shape.blocks, strict=True)]
        self.accumulating, self.replayed = accumulating, replayed
        self.base = {
            "weights": FP32 * shape.total * split.parameter_share,
            "bf16 weights": float(BF16 * (sum(kept) + shape.embedding) if self.keeps_copies else 0),
            "optimizer": moments_bytes * shape.total * split.optimizer_share,
            "communication": self._communication(),
            # An attention layer's mask (b, 1, l, l) is shared by all of them.
            "libraries": float(LIBRARY_BYTES if options.fused else 0),
            "batch": BATCH_BYTES * self.tokens + (self.tokens * length if "attention" in config.layer_mixers else 0),
        }
        if split.strategy.startswith("zero"):
            # DeepSpeed keeps its own flat fp32 partition of the weights beside the model's (ZeRO-3: the partition is the model).
            self.base["weights"] += FP32 * shape.total / split.shard if split.strategy != "zero3" else 0.0

    def _communication(self) -> float:
        """Buffers: gathered weights of the blocks in flight, gradients on their way, DeepSpeed's buckets."""
        strategy = self.split.strategy
        if self.split.world == 1 or strategy in ("single", "ddp"):
            return 0.0  # gradients are summed where they lie
        largest = max(self.shape.blocks, default=0)
        if strategy in ("fsdp2", "hsdp"):
            # Two blocks gathered, one block's gradients in fp32; the root group (embedding) stays gathered, with its gradient.
            return 2 * self.compute_bytes * largest + FP32 * largest + 2 * FP32 * self.shape.embedding
        bucket = FP32 * bucket_elements(self.shape.total)
        return bucket + (FP32 * (2 * largest + self.shape.embedding) if strategy == "zero3" else bucket)

    def moments(self) -> list[Memory]:
        """Candidates for the peak, in the order of time."""
        saved = sum(cost.saved for cost in self.costs)
        working = max(c.forward - c.saved for c in self.costs)
        found = [self._moment("forward pass of the last block", saved, working=working)]
        found += self._head(saved)
        finished = self.shape.total - sum(self.shape.blocks)
        for index in range(len(self.costs) - 1, -1, -1):
            cost = self.costs[index]
            # ``backward`` holds the block's own gradients already.
            found.append(self._moment(f"backward pass of block {index}", saved, self._gradients(finished), working=cost.backward))
            saved -= cost.saved
            finished += self.shape.blocks[index]
        found.append(self._moment("optimizer step", 0.0, self._gradients(self.shape.total)))
        return found

    def _head(self, saved: float) -> list[Memory]:
        """Final norm, logits and loss: the chunked cross-entropy computes its gradients during the forward pass."""
        d, rows = self.config.d_model, self.config.padded_vocab_size
        table = rows * d
        chunk_rows = min(self.tokens, CHUNK_ELEMENTS["cuda"] // rows)
        hidden = self.compute_bytes * d * self.tokens
        norm = FP32 * d * self.tokens
        cast = self.compute_bytes * table if self.compute_bytes != FP32 and not self.keeps_copies else 0.0
        # The Triton loss turns logits into their gradient in place; the reference holds log-probabilities (fp32) and gradients beside them.
        per_logit = self.compute_bytes if self.fused else 2 * self.compute_bytes + FP32
        forward: dict[str, float] = {"loss": 2 * hidden + FP32 * table + cast + per_logit * chunk_rows * rows}
        backward: dict[str, float] = {"loss": 2 * hidden + 2 * FP32 * table}
        return [
            self._moment("loss, forward", saved + norm, extra=forward),
            self._moment("loss, backward", saved + norm, extra=backward),
        ]

    def _gradients(self, finished: float) -> float:
        return FP32 * finished * self.split.gradient_share

    def _moment(
        self, name: str, saved: float, gradients: float = 0.0, working: float = 0.0, extra: dict[str, float] | None = None
    ) -> Memory:
        if self.accumulating:
            # Launched, FSDP reduces with the last micro-batch only: until then a rank keeps whole gradients.
            whole = self.gathers and not self.replayed
            gradients = float(FP32 * self.shape.total) if whole else self._gradients(self.shape.total)
        parts = {**self.base, "gradients": gradients, "activations": saved, "working": working, **(extra or {})}
        return Memory({part: size for part, size in parts.items() if size}, name)


def parameters_by_kind(model: LanguageModel) -> dict[str, int]:
    """Parameters of a model by what they are for."""
    kinds: dict[str, int] = {}
    for name, shape in model.parameter_shapes.items():
        kind = _kind(name)
        kinds[kind] = kinds.get(kind, 0) + torch.Size(shape).numel()
    return dict(sorted(kinds.items(), key=lambda item: -item[1]))


def _kind(name: str) -> str:
    if name.startswith(("embedding", "lm_head")):
        return "embedding and head" if name.startswith("embedding") else "head (untied)"
    if ".mlp." in name:
        return "MLP projections"
    if "conv1d" in name:
        return "convolution"
    if name.endswith(("A_log", ".D", "dt_bias")):
        return "state space (A, D, dt)"
    return "norms" if "norm" in name else "mixer projections"
