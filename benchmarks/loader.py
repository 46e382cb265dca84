"""How fast samples of 2,049 tokens are read in random order from a cold and from a warm disk cache.

    python benchmarks/loader.py [--gigabytes 4] [--folder DIR]    # writes a dataset there, measures, records, deletes it
    python benchmarks/loader.py --check                           # measures a smaller dataset, or reads the newest record with --recorded

Compared are a plain ``np.memmap`` (one page fault after another), our reader (``pread``, each window of samples announced to the disk while the
one before is read), and whole batches as the training loop takes them: read, widened to int64, with labels, document boundaries and positions.
Cold means that the files' pages were dropped from the page cache before (``posix_fadvise(DONTNEED)``); what a disk or hypervisor caches below
that stays.

Bar: the reader gives at least 50,000 samples a second cold, 205 MB/s of random reads, on a disk where the plain memmap gives under 10,000.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import numpy as np
from record import conclude, newest, record

from data_tools.indexed import IndexedWriter
from data_tools.manifest import Manifest, Shard, Split, TokenizerInfo
from mamba_pretrain.data.config import DataConfig
from mamba_pretrain.data.loader import TrainingData
from mamba_pretrain.data.order import permute, round_keys
from mamba_pretrain.data.packed_dataset import TokenStream
from mamba_pretrain.data.storage import DatasetFolder

LENGTH = 2048
SHARDS = 8
WINDOW = 256  # samples; as many as data.read_ahead
BAR, PLAIN = 50_000, 10_000  # samples a second


def write_dataset(folder: Path, gigabytes: float) -> None:
    """Random tokens in documents of log-normal lengths, like web text."""
    random = np.random.default_rng(0)
    block = random.integers(0, 50_000, 1 << 24, dtype=np.uint16)
    split = Split()
    for number in range(SHARDS):
        name = f"train/{number:05d}"
        lengths = np.clip(random.lognormal(6.5, 1.2, int(gigabytes * 1e9 / 2 / SHARDS / 1350)).astype(np.int64), 8, 100_000)
        with IndexedWriter(folder / name, np.uint16) as writer:
            for part in np.array_split(lengths, max(1, int(lengths.sum() // len(block)) + 2)):
                writer.add(block[: part.sum()], part)
        split.shards.append(Shard(name, len(lengths), int(lengths.sum()), "uint16", "", ""))
    Manifest(tokenizer=TokenizerInfo("none", "none", 50_000, None, None), splits={"train": split}).save(folder)


def drop_cache(folder: Path) -> None:
    """Drops the dataset's pages from the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def rate(produce: Callable[[], Iterator[int]], seconds: float, most: float = math.inf) -> float:
    """Samples a second, of so many seconds or samples; ``produce`` yields how many samples each of its steps gave."""
    count, began = 0, time.perf_counter()
    for samples in produce():
        count += samples
        if time.perf_counter() - began > seconds or count >= most:
            break
    return count / (time.perf_counter() - began)


def order(n: int) -> Iterator[np.ndarray]:
    """Random samples, a window at a time."""
    keys = round_keys("benchmark")
    for start in range(0, n - WINDOW, WINDOW):
        yield permute(np.arange(start, start + WINDOW), n, keys)


def memmap(folder: Path) -> Iterator[int]:
    """The plain way."""
    maps = [np.memmap(path, dtype=np.uint16, mode="r") for path in sorted((folder / "train").glob("*.bin"))]
    per_shard = min(len(shard) for shard in maps) // LENGTH - 1
    for samples in order(per_shard * len(maps)):
        for shard, place in zip(*np.divmod(samples, per_shard), strict=True):
            np.array(maps[shard][place * LENGTH : (place + 1) * LENGTH + 1])
        yield len(samples)


def reader(folder: Path) -> Iterator[int]:
    """Our reader alone: tokens in the file's own width, one window announced while the one before is read."""
    stream = TokenStream(DatasetFolder(str(folder)), "train")
    count = np.full(WINDOW, LENGTH + 1)
    buffer = np.empty((WINDOW, LENGTH + 1), dtype=np.uint16)
    expected = None
    for samples in order(stream.n_tokens // LENGTH - 1):
        following = stream.locate(samples * LENGTH, count, np.arange(WINDOW) * (LENGTH + 1))
        stream.expect(following)
        if expected is not None:
            stream.read(expected, buffer)
            yield WINDOW
        expected = following
    stream.close()


def batches(folder: Path, workers: int, packing: str = "concat") -> Iterator[int]:
    """Whole batches, as the training loop takes them."""
    config = DataConfig(path=str(folder), sequence_length=LENGTH, workers=workers, packing=packing)
    data = TrainingData(config, seed=1, micro_batch_size=16)
    try:
        for start in range(0, 10**9, 512):
            yield sum(len(batch.tokens) for batch in data.take(start, 512))
    finally:
        data.close()


def measure(folder: Path, gigabytes: float, seconds: float) -> dict[str, Any]:
    """Rates of all ways, cold and warm."""
    ways: dict[str, Callable[[], Iterator[int]]] = {
        "memmap": lambda: memmap(folder),
        "reader": lambda: reader(folder),
        "batches": lambda: batches(folder, 1),
        "batches, 2 threads": lambda: batches(folder, 2),
        "batches, best-fit": lambda: batches(folder, 1, "best-fit"),
    }
    found: dict[str, Any] = {}
    for name, produce in ways.items():
        drop_cache(folder)
        # A page fault reads on: a memmap would soon have cached a dataset of a few GB, and not be cold any more.
        found[name] = {"cold": rate(produce, seconds, most=gigabytes * 1000 if name == "memmap" else math.inf)}
    for path in (folder / "train").iterdir():
        with path.open("rb") as file:
            while file.read(1 << 24):
                pass
    for name, produce in ways.items():
        found[name]["warm"] = rate(produce, seconds)
    return found


def check(result: dict[str, Any]) -> list[str]:
    """Prints the figures; returns what is under the bar."""
    rates = result["samples_per_second"]
    print(f"samples of {LENGTH + 1} tokens a second, {result['gigabytes']} GB, {result['cpus']} CPUs")
    for name, found in rates.items():
        print(f"  {name:20} cold {found['cold']:>10,.0f}   warm {found['warm']:>10,.0f}")
    ours, plain = rates["reader"]["cold"], rates["memmap"]["cold"]
    print(f"  the reader is {ours / plain:.1f} times the memmap when cold; load average {result['load_average']:.1f}")
    if plain >= PLAIN:
        print(f"  the memmap gives over {PLAIN:,} cold: this disk, or a cache below it, answers faster than the bar takes for granted")
    return [] if ours >= BAR else [f"the reader gives {ours:,.0f} samples a second cold, the bar is {BAR:,}"]


def main() -> None:
    """Measures, or reads a record, and checks the bar."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="a quick measurement that is not recorded")
    parser.add_argument("--recorded", action="store_true", help="check the newest record instead of measuring")
    parser.add_argument("--gigabytes", type=float, default=None, help="size of the dataset (4; with --check 0.5)")
    parser.add_argument("--seconds", type=float, default=None, help="seconds for each figure (10; with --check 2)")
    parser.add_argument("--folder", type=Path, default=None, help="where to write the dataset: the disk to be measured")
    arguments = parser.parse_args()
    gigabytes = arguments.gigabytes or (0.5 if arguments.check else 4.0)
    if arguments.recorded:
        result = newest("loader")
    else:
        folder = Path(tempfile.mkdtemp(prefix="loader-", dir=arguments.folder))
        try:
            write_dataset(folder, gigabytes)
            os.sync()  # what else the disk has to write would be measured too
            rates = measure(folder, gigabytes, arguments.seconds or (2.0 if arguments.check else 10.0))
        finally:
            shutil.rmtree(folder)
        result = {"samples_per_second": rates, "gigabytes": gigabytes, "cpus": os.cpu_count(), "load_average": os.getloadavg()[0]}
        if not arguments.check:
            result = json.loads(record("loader", result).read_text())
    conclude(check(result))


if __name__ == "__main__":
    main()
