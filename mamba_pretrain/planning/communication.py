"""Bytes a rank sends per step, and what that costs at scale under a stated model of the network."""

from __future__ import annotations

from dataclasses import dataclass

from mamba_pretrain.planning.memory import Sharding, sharding


@dataclass(frozen=True)
class Network:
    """Bandwidths in bytes per second and GPU, one way. Defaults: NVLink 4 and one 400 Gb/s adapter per GPU at 80% of the wire."""

    gpus_per_node: int = 8
    inside_node: float = 360e9
    between_nodes: float = 40e9
    latency: float = 20e-6  # seconds per collective and doubling of ranks
    overlap: float = 0.8  # share of the backward pass (two thirds of the computing) that communication can hide behind

    @property
    def statement(self) -> str:
        """The model in one sentence."""
        return (
            f"ring collectives at {self.inside_node / 1e9:.0f} GB/s per GPU inside a node of {self.gpus_per_node} and "
            f"{self.between_nodes / 1e9:.0f} GB/s between nodes, {self.latency * 1e6:.0f} us x log2(ranks) per collective, "
            f"hidden behind {self.overlap:.0%} of the backward pass"
        )


@dataclass(frozen=True)
class Traffic:
    """Per step and rank: bytes sent in collectives over ``ranks`` ranks, and how many collectives.

    ``adapters``: network adapters of a node that carry the ring between nodes; 0 when the ring stays inside one.
    """

    what: str
    bytes: float
    collectives: int
    ranks: int
    adapters: int


def traffic(
    split: Sharding, n_parameters: int, n_layer: int, accumulation: int, compute_bytes: int, gpus_per_node: int = 8
) -> list[Traffic]:
    """What a step sends. Gradients travel in fp32; FSDP gathers weights in the compute dtype, ZeRO in fp32."""
    if split.world == 1:
        return []
    ring = (split.world - 1) / split.world
    adapters = gpus_per_node if split.world > gpus_per_node else 0
    grads, weights = 4.0 * n_parameters, float(compute_bytes) * n_parameters
    if split.strategy == "ddp":
        return [Traffic("all-reduce of gradients", 2 * ring * grads, max(1, int(grads // 25e6)), split.world, adapters)]
    if split.strategy == "zero1":
        return [
            Traffic("all-reduce of gradients", 2 * ring * grads, max(1, int(grads // 2e9)), split.world, adapters),
            Traffic("all-gather of weights", ring * grads, max(1, int(grads // 2e9)), split.world, adapters),
        ]
    if split.strategy == "zero2":
        return [
            Traffic("reduce-scatter of gradients", ring * grads * accumulation, accumulation, split.world, adapters),
            Traffic("all-gather of weights", ring * grads, max(1, int(grads // 2e9)), split.world, adapters),
        ]
    return _fully_sharded(split, grads, weights, n_layer, accumulation, gpus_per_node)


def _fully_sharded(split: Sharding, grads: float, weights: float, n_layer: int, accumulation: int, gpus_per_node: int) -> list[Traffic]:
    ring = (split.shard - 1) / split.shard
    adapters = gpus_per_node if split.shard > gpus_per_node else 0
    gathered = grads if split.strategy == "zero3" else weights
    scatters = accumulation if split.strategy == "zero3" else 1
    found = [
        Traffic(
            "all-gather of weights, twice per micro-batch",
            2 * ring * gathered * accumulation,
            2 * n_layer * accumulation,
            split.shard,
            adapters,
        ),
        Traffic("reduce-scatter of gradients", ring * grads * scatters, n_layer * scatters, split.shard, adapters),
    ]
    replicas = split.world // split.shard
    if replicas > 1:
        share = grads / split.shard
        # Every GPU of a node is in a ring of its own, so each ring has one adapter.
        found.append(Traffic("all-reduce between replicas", 2 * (replicas - 1) / replicas * share, n_layer, replicas, 1))
    return found


def seconds(flows: list[Traffic], network: Network) -> float:
    """Time of all collectives of a step, one after the other."""
    total = 0.0
    for flow in flows:
        bandwidth = min(network.inside_node, network.between_nodes * flow.adapters) if flow.adapters else network.inside_node
        total += flow.bytes / bandwidth + flow.collectives * network.latency * max(1, (flow.ranks - 1).bit_length())
    return total


def step_seconds(compute: float, flows: list[Traffic], network: Network) -> float:
    """Computing time plus what of the communication cannot hide behind it."""
    hidden = network.overlap * compute * 2 / 3
    return compute + max(0.0, seconds(flows, network) - hidden)


@dataclass(frozen=True)
class ScalePoint:
    """Expected speed on ``gpus`` GPUs at the same global batch."""

    gpus: int
    step_seconds: float
    efficiency: float


def scaling(
    strategy: str,
    n_parameters: int,
    n_layer: int,
    compute_one_gpu: float,
    batch_samples: int,
    micro_batch: int,
    compute_bytes: int,
    network: Network,
    least_a_micro_batch: float = 0.0,
) -> list[ScalePoint]:
    """From one GPU to 1,024 (or as far as the global batch can be split), at a constant global batch.

    ``compute_one_gpu``: seconds of computing a step on one GPU. ``least_a_micro_batch``: seconds that several GPUs need for one in any case.
    """
    points = []
    gpus = 1
    while gpus <= 1024 and batch_samples // gpus >= 1:
        per_rank = -(-batch_samples // gpus)
        accumulation = -(-per_rank // micro_batch)
        used = strategy if gpus > 1 else "single"
        flows = traffic(
            sharding(used, gpus, network.gpus_per_node), n_parameters, n_layer, accumulation, compute_bytes, network.gpus_per_node
        )
        # A rank works on whole samples: an uneven split makes all wait for the fullest.
        compute = compute_one_gpu * per_rank / batch_samples
        step = step_seconds(compute, flows, network)
        if gpus > 1:
            step = max(step, least_a_micro_batch * accumulation)
        points.append(ScalePoint(gpus, step, compute_one_gpu / gpus / step))
        gpus *= 2
    return points
