"""Compares the newest record of every benchmark with the one before it on the same device, and says what got slower or larger.

    python benchmarks/check.py [--tolerance 0.05] [--only train_step]

Exit code 1 if any figure got worse by more than the tolerance. Figures are compared where both records have them, by their place in it.
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

# By the last part of a figure's name: whether more is better. Other figures are not compared.
HIGHER = re.compile(r"(per_second|_gbs|gb_s|mfu(_6n)?|tflops|speedup|ratio|throughput|efficiency)$")
LOWER = re.compile(r"(_ms|_seconds|seconds|peak|peak_gb|memory_gb|milliseconds|wait_share|_us)$")
LABELS = ("model", "name", "op", "shape", "checkpointing", "engine", "strategy", "tokenizer")


def figures(value: Any, path: str = "") -> Iterator[tuple[str, float]]:
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


def compare(before: dict[str, Any], after: dict[str, Any], tolerance: float) -> tuple[list[str], int]:
    """Sentences on figures that got worse by more than ``tolerance``, and how many were compared."""
    old = dict(figures(before))
    worse, compared = [], 0
    for path, value in figures(after):
        higher, lower = HIGHER.search(path), LOWER.search(path)
        reference = old.get(path)
        if reference is None or reference <= 0 or value <= 0 or not (higher or lower):
            continue
        compared += 1
        change = value / reference - 1
        if (-change if higher else change) > tolerance:
            worse.append(f"{path}: {reference:.6g} -> {value:.6g} ({change:+.1%})")
    return worse, compared


def last_two(folder: Path, only: str | None) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Per benchmark and device, the record before the newest and the newest."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for path in folder.glob("*.json"):
        record = json.loads(path.read_text())
        if only in (None, record["name"]):
            groups.setdefault((record["name"], record["device"]), []).append(record)
    for (name, device), records in sorted(groups.items()):
        records.sort(key=lambda record: record["date"])
        if len(records) > 1:
            yield f"{name} on {device}", records[-2], records[-1]


def main() -> None:
    """Compares and reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="accepted for uniformity: this script only ever checks")
    parser.add_argument("--tolerance", type=float, default=0.05, help="share by which a figure may get worse")
    parser.add_argument("--only", help="one benchmark")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    failed = False
    for title, before, after in last_two(arguments.results, arguments.only):
        worse, compared = compare(before, after, arguments.tolerance)
        print(
            f"{title}: {compared} figures, {len(worse)} worse by more than {arguments.tolerance:.0%} ({before['date']} -> {after['date']})"
        )
        for line in worse:
            print(f"  WORSE {line}")
        failed = failed or bool(worse)
    sys.exit(failed)


if __name__ == "__main__":
    main()
