"""Tokens per second, model FLOPs utilisation (MFU) and memory, without ever waiting for the device."""

from __future__ import annotations

import resource
import sys
from collections import deque
from typing import Any

# Dense bf16 peak in TFLOP/s and memory in GB (1e9 bytes) of one device, by a part of its name, from the makers' data sheets.
# More specific names first: the first that occurs in the device's name counts.
DEVICES: tuple[tuple[str, float, float], ...] = (
    ("GB200", 2500.0, 192.0),
    ("B200", 2250.0, 192.0),
    ("B100", 1750.0, 192.0),
    ("GH200", 989.4, 101.0),
    ("H200", 989.4, 150.1),
    ("H100 NVL", 835.5, 99.8),
    ("H100 PCIe", 756.5, 85.0),
    ("H100", 989.4, 85.0),
    ("H800", 989.4, 85.0),
    ("H20", 148.0, 101.0),
    ("A100-SXM4-40GB", 311.9, 42.4),
    ("A100-PCIE-40GB", 311.9, 42.4),
    ("A100", 311.9, 85.0),
    ("A800", 311.9, 85.0),
    ("A40", 149.7, 47.7),
    ("A30", 165.0, 25.2),
    ("A10G", 70.0, 23.7),
    ("A10", 125.0, 23.7),
    ("L40S", 362.0, 47.7),
    ("L40", 181.0, 47.7),
    ("L4", 121.0, 23.7),
    ("RTX 6000 Ada", 364.0, 50.9),
    ("RTX 5090", 209.5, 33.7),
    ("RTX 4090", 165.2, 25.3),
    ("RTX 3090", 71.0, 25.3),
)


def device_entry(name: str) -> tuple[str, float, float] | None:
    """(name, peak TFLOP/s, memory in GB) of the first table entry that occurs in ``name``, e.g. ``NVIDIA H100 80GB HBM3``."""
    folded = name.lower().replace("-", " ")
    return next((entry for entry in DEVICES if entry[0].lower().replace("-", " ") in folded), None)


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of a device; None when it is not in the table (a CPU, an unknown GPU): its MFU is then null, not a guess."""
    entry = device_entry(device_name)
    return entry[1] * 1e12 if entry else None


class Throughput:
    """Turns the tokens and seconds of each step into the throughput columns of a train row.

    ``tokens_per_second`` is the mean over the last ``window`` steps: with a row every ``window`` steps, each second counts exactly once.
    ``step_time`` of the row beside it is the single step's.
    """

    def __init__(
        self, flops_per_token: float, n_parameters: int, world_size: int, device_type: str, peak: float | None, window: int = 10
    ) -> None:
        """``flops_per_token``: model FLOPs, forward and backward (models/model_flops.py). ``peak``: FLOP/s of one device, see ``peak_flops``."""
        self._flops_per_token = flops_per_token
        self._n_parameters = n_parameters
        self._total_peak = peak * world_size if peak else None
        self._on_cuda = device_type == "cuda"
        self._steps: deque[tuple[int, float]] = deque(maxlen=window)

    def row(self, tokens: int, seconds: float) -> dict[str, Any]:
        """Columns for a step of ``tokens`` tokens over all ranks that took ``seconds``.

        ``tokens_per_second`` over all ranks, ``mfu`` from model FLOPs, ``mfu_6n`` from 6 x parameters (what many others report), both null
        without a known peak; ``memory_gb`` is this rank's peak in units of 1e9 bytes.
        """
        self._steps.append((tokens, seconds))
        total = sum(t for t, _ in self._steps)
        elapsed = sum(s for _, s in self._steps)
        rate = total / elapsed if elapsed > 0 else None
        share = None if rate is None or self._total_peak is None else rate / self._total_peak
        return {
            "tokens_per_second": rate,
            "mfu": None if share is None else share * self._flops_per_token,
            "mfu_6n": None if share is None else share * 6.0 * self._n_parameters,
            "memory_gb": peak_memory(self._on_cuda) / 1e9,
        }


def peak_memory(on_cuda: bool) -> int:
    """Peak bytes: what torch's allocator held on the GPU (a counter on the host, no synchronisation), else the process's resident set."""
    if on_cuda:
        import torch

        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
