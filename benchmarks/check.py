"""Compares every figure's newest record with the one before it on the same device, and says what got slower or larger.

    python benchmarks/check.py [--tolerance 0.05] [--only train_step]

Exit code 1 if any figure got worse by more than the tolerance. A figure is known by its place in the record; a run that measures a part only is
compared where it has figures, with the last run that has them too. What is not this project's (peers, what the hardware allows) is left out.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from record import RESULTS

# By the last part of a figure's name that has a unit: whether more is better. Other figures are not compared: utilisation and speed-ups follow
# from these and from peers.
HIGHER = re.compile(r"(per_second(_per_gpu)?|_gbs|gb_s|tflops|throughput|efficiency|weak_scaling)$")
LOWER = re.compile(r"(_ms|_seconds|seconds|peak|_gb|milliseconds|wait_share|_us)$")
NOT_OURS = re.compile(r"(^|[.\[])(mamba_ssm|fla|transformers|causal_conv1d|megatron|datatrove|datasets|bare encoder|floor|moved)")
LABELS = (
    "model",
    "name",
    "mixer",
    "op",
    "shape",
    "length",
    "batch",
    "accumulation",
    "checkpointing",
    "engine",
    "gpus",
    "strategy",
    "tokenizer",
)
Figure = tuple[str, float]


def figures(value: Any, path: str = "") -> Iterator[Figure]:
    """Every number of a record with its path; list items are named by what labels them, so that a reordered table still compares."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from figures(item, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            label = "/".join(str(item[key]) for key in LABELS if key in item) if isinstance(item, dict) else ""
            yield from figures(item, f"{path}[{label or index}]")
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path, float(value)


def more_is_better(path: str) -> bool | None:
    """What the name says; None for a figure that is not compared."""
    if NOT_OURS.search(path) or path.endswith("]"):  # single samples in a list
        return None
    for part in reversed(re.sub(r"\[[^]]*\]", "", path).split(".")):
        if HIGHER.search(part) or LOWER.search(part):
            return HIGHER.search(part) is not None
    return None


def histories(records: list[dict[str, Any]]) -> dict[str, list[Figure]]:
    """Dates and values of every figure that is compared, in order of time; ``records`` are of one benchmark on one device."""
    found: dict[str, list[Figure]] = {}
    for record in sorted(records, key=lambda record: record["date"]):
        for path, value in figures(record):
            if value > 0 and more_is_better(path) is not None:
                found.setdefault(path, []).append((record["date"], value))
    return found


def compare(history: dict[str, list[Figure]], tolerance: float) -> tuple[list[str], int]:
    """Sentences on figures that got worse by more than ``tolerance``, and how many were compared."""
    pairs = {path: values[-2:] for path, values in history.items() if len(values) > 1}
    worse = []
    for path, ((before, reference), (after, value)) in pairs.items():
        change = value / reference - 1
        if (-change if more_is_better(path) else change) > tolerance:
            worse.append(f"{path}: {reference:.6g} -> {value:.6g} ({change:+.1%}) from {before[:16]} to {after[:16]}")
    return worse, len(pairs)


def main() -> None:
    """Compares and reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="accepted for uniformity: this script only ever checks")
    parser.add_argument("--tolerance", type=float, default=0.05, help="share by which a figure may get worse")
    parser.add_argument("--only", help="one benchmark")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for file in arguments.results.glob("*.json"):
        record = json.loads(file.read_text())
        if arguments.only in (None, record["name"]):
            groups.setdefault((record["name"], record["device"]), []).append(record)
    failed = False
    for (name, device), records in sorted(groups.items()):
        if len(records) < 2:
            continue
        worse, compared = compare(histories(records), arguments.tolerance)
        print(f"{name} on {device}: {compared} figures, {len(worse)} worse by more than {arguments.tolerance:.0%}")
        for line in worse:
            print(f"  WORSE {line}")
        failed = failed or bool(worse)
    sys.exit(failed)


if __name__ == "__main__":
    main()
