"""Exact duplicates: of equal documents the first stays, in the order of the input, whatever the number of workers.

A first pass writes every document's 128-bit hash. They are compared one range of hash values after another, so that memory stays bounded.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import xxhash

from data_tools.pool import Report
from data_tools.storage import write_whole
from data_tools.worker import Plan, TaskResult, documents

HASHES_AT_ONCE = 4 << 20  # 32 bytes each with their places
HASH = np.dtype([("high", "<u8"), ("low", "<u8")])


def document_hash(data: bytes) -> tuple[int, int]:
    """128 bits as two halves: two different documents share them with a chance of 1e-20 among 1e9."""
    value = xxhash.xxh3_128_intdigest(data)
    return value >> 64, value & 0xFFFF_FFFF_FFFF_FFFF


def open_hash_job(plan: Plan) -> Callable[[int, Report], int]:
    """A process's function that writes the hashes of a task's documents, unless an earlier run did."""

    def job(number: int, report: Report) -> int:
        path = hashes_path(plan, number)
        if not path.is_file():
            texts = documents(plan.tasks[number], plan.options, TaskResult(), report)
            hashes = np.fromiter((document_hash(text) for text in texts), dtype=HASH)
            write_whole(path, hashes.tobytes())
        return number

    return job


def hashes_path(plan: Plan, number: int) -> Path:
    """The hashes of a task's documents; the name holds the task's key, so that those of a changed file are not believed."""
    return plan.notes / "hashes" / f"{number:05d}-{plan.keys[number]}.bin"


def write_duplicates(plan: Plan) -> int:
    """Lists each task's duplicates in ``plan.duplicates(number)``; returns how many there are in all."""
    final = plan.duplicates(0).parent
    temporary = final.with_name(f".tmp-{final.name}")
    for folder in (final, temporary):
        shutil.rmtree(folder, ignore_errors=True)
    temporary.mkdir(parents=True)
    count = 0
    for task, places in duplicates([hashes_path(plan, number) for number in range(len(plan.tasks))]):
        with (temporary / plan.duplicates(task).name).open("ab") as file:
            file.write(places.tobytes())
        count += len(places)
    os.replace(temporary, final)
    return count


def duplicates(files: Sequence[Path]) -> Iterator[tuple[int, np.ndarray]]:
    """``(file, places)`` of hashes that stand earlier in the same file or in a file before it; a file may come several times."""
    total = sum(file.stat().st_size for file in files) // HASH.itemsize
    bits = max(0, (total // HASHES_AT_ONCE).bit_length())
    for value in range(1 << bits):
        found = [_range(file, number, value, bits) for number, file in enumerate(files)]
        hashes = np.concatenate([rows for rows, _, _ in found])
        tasks = np.concatenate([numbers for _, numbers, _ in found])
        places = np.concatenate([rows for _, _, rows in found])
        order = np.lexsort((hashes["low"], hashes["high"]))  # stable: equal hashes stay in the order of the input
        same = hashes[order][1:] == hashes[order][:-1]
        later = np.sort(order[1:][same])
        for task in np.unique(tasks[later]).tolist():
            yield task, places[later][tasks[later] == task]


def _range(file: Path, number: int, value: int, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A file's hashes whose highest bits are ``value``, the file's number for each, and their places."""
    hashes = np.memmap(file, dtype=HASH, mode="r") if file.stat().st_size else np.zeros(0, dtype=HASH)
    places = np.flatnonzero(hashes["high"] >> np.uint64(64 - bits) == value) if bits else np.arange(len(hashes))
    return np.array(hashes[places]), np.full(len(places), number, dtype=np.int32), places.astype(np.int64)
