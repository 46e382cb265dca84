"""Expected tokens per second: measured figures, carried over to other sizes at the same utilisation. Each says where it comes from."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mamba_pretrain.models.config import ModelConfig
from mamba_pretrain.monitor.throughput import device_entry

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
PEERS = "mamba_ssm 2.3.2 on one H100, bf16, length 2048"
# A step's time by what the backward pass computes again, as a multiple of one that keeps all. A block's forward pass is one more beside three;
# the others are by the kernels' times in a step of Mamba-1 at 370m to 1.4b on an H100.
RECOMPUTE_COST = {"none": 1.0, "selective": 1.06, "projections": 1.15, "block": 4.0 / 3.0}
# How many times as fast FP8 matmuls make a step, measured for Mamba-1 at 1.4b on an H100. In narrower models matmuls have a smaller share, and
# nothing was measured: nothing is promised.
FP8_GAIN = {"off": 1.0, "tensorwise": 1.15, "rowwise": 1.14, "blockwise": 1.06}
FP8_MEASURED_WIDTH = 2048
# What Python needs to launch a block's kernels, forward and backward, under DeepSpeed: Mamba-1 and Mamba-2 370m on two machines with two H200s took
# 4 to 6 ms, stage 3 9 to 13 (benchmarks/engine_gpus.py). The other engines replay CUDA graphs.
LAUNCHING_SECONDS = {"zero1": 4e-3, "zero2": 4e-3, "zero3": 10e-3}


@dataclass(frozen=True)
class Measured:
    """Tokens per second of one GPU for one model."""

    mixer: str
    n_layer: int
    d_model: int
    tokens_per_second: float
    device: str
    source: str


# Floor for this project's own speed until it has been measured on the machine at hand.
PEER_TABLE = tuple(
    Measured(mixer, layers, width, rate, "NVIDIA H100 80GB HBM3", PEERS)
    for mixer, layers, width, rate in (
        ("mamba1", 24, 768, 161_876),
        ("mamba1", 48, 1024, 67_644),
        ("mamba1", 48, 2048, 29_229),
        ("mamba1", 64, 2560, 15_468),
        ("mamba2", 24, 768, 188_608),
        ("mamba2", 48, 1024, 91_305),
        ("mamba2", 48, 2048, 38_869),
    )
)
SIZES = {"130m": (24, 768), "370m": (48, 1024), "790m": (48, 1536), "780m": (48, 1536), "1.4b": (48, 2048), "1.3b": (48, 2048)}
SIZES |= {"2.8b": (64, 2560), "2.7b": (64, 2560)}
LENGTH = 2048  # of the sequences that the figures are of


@dataclass(frozen=True)
class Speed:
    """Tokens per second of one GPU, the model FLOPs utilisation behind it, and its source in words."""

    tokens_per_second: float
    mfu: float
    source: str


def launching_seconds(strategy: str, n_layer: int, micro_batches: int) -> float:
    """What a step takes about, however fast the GPUs are."""
    return LAUNCHING_SECONDS.get(strategy, 0.0) * n_layer * micro_batches


def fp8_gain(recipe: str, d_model: int) -> float:
    """How many times as fast a step is with ``precision.fp8``."""
    return FP8_GAIN[recipe] if d_model >= FP8_MEASURED_WIDTH else 1.0


def own_records(folder: Path = RESULTS) -> list[Measured]:
    """This project's own figures from ``benchmarks/train_step.py``, the newest record of each device and model."""
    found: dict[tuple[str, str], Measured] = {}
    records = [json.loads(path.read_text()) for path in folder.glob("train_step-*.json")]
    for record in sorted(records, key=lambda r: str(r.get("date"))):
        for row in record.get("comparisons", []):
            rate = row.get("ours", {}).get("tokens_per_second")
            mixer, _, size = row["model"].partition("-")
            if rate and size in SIZES and row.get("length", LENGTH) == LENGTH:
                source = f"this project on {record['device']}, {record['date'][:10]}"
                found[record["device"], row["model"]] = Measured(mixer, *SIZES[size], rate, record["device"], source)
    return list(found.values())


def expected_speed(
    config: ModelConfig, flops_per_token: float, flops_of: Any, device: str, table: list[Measured] | None = None
) -> Speed | None:
    """The speed of ``config`` on ``device`` at the utilisation of the most similar measured model; None for a device without a known peak.

    ``flops_of(mixer, n_layer, d_model)`` gives the training FLOPs per token of a measured model.
    """
    entry = device_entry(device)
    if entry is None:
        return None
    rows = table if table is not None else (own_records() or list(PEER_TABLE))
    mixers = config.layer_mixers
    main = max(set(mixers), key=mixers.count)
    rows = [row for row in rows if row.mixer == main] or [row for row in rows if row.mixer == "mamba2"] or rows
    same_device = [row for row in rows if device_entry(row.device) == entry]
    nearest = min(same_device or rows, key=lambda row: abs(math.log(row.d_model / config.d_model)))
    measured_on = device_entry(nearest.device)
    if measured_on is None:
        return None
    mfu = nearest.tokens_per_second * flops_of(nearest.mixer, nearest.n_layer, nearest.d_model) / (measured_on[1] * 1e12)
    source = nearest.source
    if (nearest.n_layer, nearest.d_model, nearest.mixer) != (config.n_layer, config.d_model, config.mixer):
        source += f", carried over from {nearest.mixer} with {nearest.n_layer} layers of {nearest.d_model}"
    if measured_on != entry:
        source += f", scaled to {entry[0]} by peak FLOP/s"
    return Speed(mfu * entry[1] * 1e12 / flops_per_token, mfu, source)
