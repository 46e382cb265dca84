"""The training loop's source of batches: which samples is arithmetic, reading them is a background thread's work."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_tools.errors import UserError
from data_tools.manifest import Manifest
from mamba_pretrain.data.batch import Batch
from mamba_pretrain.data.blend import BlendSchedule
from mamba_pretrain.data.collate import collate
from mamba_pretrain.data.config import DataConfig, SourceConfig
from mamba_pretrain.data.order import epoch_order
from mamba_pretrain.data.packed_dataset import PackedDataset, Sample


class TrainingData:
    """The endless, blended, shuffled sequence of samples of a run, and this process's share of any range of it.

    Sample i of the run is a pure function of (datasets, seed, blend schedule, i): the same for every world size and micro-batch size.
    """

    def __init__(self, config: DataConfig, seed: int, rank: int, world_size: int, micro_batch_size: int) -> None:
        check_tokenizers(config)
        self._config = config
        self._seed = seed
        self._rank, self._world, self._micro = rank, world_size, micro_batch_size
        self._datasets = {
            source.name: PackedDataset(source.path, config.train_split, config.sequence_length, config.packing) for source in config.sources
        }
        self._weights = {source.name: source.weight for source in config.sources}
        self._schedule = BlendSchedule(list(self._weights), list(self._weights.values()))
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="data")
        self._ahead: tuple[tuple[int, int], Future[list[Batch]]] | None = None

    # -- what the data is

    @property
    def sequence_length(self) -> int:
        """Tokens per sample."""
        return self._config.sequence_length

    @property
    def manifest(self) -> Manifest:
        """The first source's manifest; all share its tokenizer."""
        return next(iter(self._datasets.values())).stream.manifest

    @property
    def vocab_size(self) -> int:
        """Ids in the data are smaller than this."""
        return self.manifest.tokenizer.vocab_size

    @property
    def tokenizer_dir(self) -> Path:
        """The folder of the tokenizer's files."""
        return self._config.sources[0].path / "tokenizer"

    @property
    def total_samples(self) -> dict[str, int]:
        """Samples in one epoch of each source."""
        return {name: len(dataset) for name, dataset in self._datasets.items()}

    @property
    def fingerprint(self) -> str:
        """Hash of everything that decides which sample is which, but for the weights, which may change."""
        parts = [self._config.packing, str(self.sequence_length), self._config.train_split, str(self._seed), str(self._config.shuffle)]
        parts += sorted(f"{name}:{dataset.stream.manifest.fingerprint}" for name, dataset in self._datasets.items())
        return hashlib.sha256("|".join(parts).encode()).hexdigest()[:32]

    def bytes_per_token(self, name: str) -> float | None:
        """UTF-8 bytes per token in a source's validation split; None if they were not counted."""
        return bytes_per_token(next(source for source in self._config.sources if source.name == name), self._config.validation_split)

    # -- batches

    def take(self, first_sample: int, n_samples: int) -> list[Batch]:
        """This process's micro-batches of the samples [first, first + n), and begins to read the next ``n`` ahead.

        Micro-step m covers the m-th block of world size x micro-batch samples, rank by rank. Raises UserError if ``n_samples`` is no multiple of that.
        """
        wanted = (first_sample, n_samples)
        quantum = self._world * self._micro
        if n_samples % quantum:
            raise UserError(f"{n_samples} samples are not divisible by world size x micro-batch = {quantum}")
        future = self._ahead[1] if self._ahead is not None and self._ahead[0] == wanted else self._pool.submit(self._load, *wanted)
        batches = future.result()
        following = (first_sample + n_samples, n_samples)
        self._ahead = following, self._pool.submit(self._load, *following)
        return batches

    def _load(self, first: int, count: int) -> list[Batch]:
        ids = self._own(first, count)
        located = self._locate(first, count)
        places = [located[i - first] for i in ids]
        for name, index in places:
            self._datasets[name].will_need(index)
        samples = [self._datasets[name][index] for name, index in places]
        masked = self._config.mask_cross_document
        batches = [collate(samples[i : i + self._micro], ids[i : i + self._micro], masked) for i in range(0, len(ids), self._micro)]
        return [batch.pinned() for batch in batches] if torch.cuda.is_available() else batches

    def _own(self, first: int, count: int) -> list[int]:
        block = self._world * self._micro
        return [first + start + self._rank * self._micro + i for start in range(0, count, block) for i in range(self._micro)]

    def _locate(self, first: int, count: int) -> list[tuple[str, int]]:
        """(source, sample index within it) of each of a range of the run's samples."""
        located = self._schedule.locate(first, count)
        found: list[tuple[str, int]] = [("", 0)] * count
        for name, dataset in self._datasets.items():
            mine = [i for i, (source, _) in enumerate(located) if source == name]
            if not mine:
                continue
            start = located[mine[0]][1]  # a source's cursors run on by one
            order = epoch_order(len(dataset), self._seed, dataset.stream.manifest.fingerprint, start, len(mine), self._config.shuffle)
            for i, index in zip(mine, order, strict=True):
                found[i] = name, int(index)
        return found

    def sample_ids(self, first: int, count: int) -> list[tuple[str, int]]:
        """(source, sample index) of a range of the run's samples, for tests and for looking."""
        return self._locate(first, count)

    # -- state

    def state(self) -> dict[str, Any]:
        """Integers and names only: the blends so far and what the data was."""
        return {"blend": self._schedule.state(), "fingerprint": self.fingerprint}

    def load(self, state: dict[str, Any], sample: int) -> bool:
        """Continues at ``sample``; if the config's blend differs from the saved one, it begins there. Returns whether it does."""
        self._drop_ahead()
        self._schedule.load(state["blend"])
        return self._schedule.change(sample, self._weights)

    def _drop_ahead(self) -> None:
        if self._ahead is not None:
            self._ahead[1].cancel() or self._ahead[1].exception()
            self._ahead = None

    def close(self) -> None:
        """Stops the thread and closes the files."""
        self._drop_ahead()
        self._pool.shutdown(wait=True)
        for dataset in self._datasets.values():
            dataset.stream.close()


def check_tokenizers(config: DataConfig) -> None:
    """Raises UserError unless all sources were made with one tokenizer."""
    first, *others = config.sources
    expected = Manifest.load(first.path).tokenizer.hash
    for source in others:
        if Manifest.load(source.path).tokenizer.hash != expected:
            raise UserError(f"{first.path} and {source.path} were tokenized with different tokenizers; tokenize one of them again")


def bytes_per_token(source: SourceConfig, split: str) -> float | None:
    """UTF-8 bytes of text per token of a source's split; None if they were not counted."""
    found = Manifest.load(source.path).splits.get(split)
    return found.text_bytes / found.tokens if found is not None and found.text_bytes and found.tokens else None


def validation_names(config: DataConfig) -> list[str]:
    """The sources that have a validation split."""
    names = []
    for source in config.sources:
        split = Manifest.load(source.path).splits.get(config.validation_split)
        if split is not None and split.tokens > 1:
            names.append(source.name)
    return names


def validation_batches(
    config: DataConfig, name: str, rank: int, world_size: int, micro_batch_size: int, max_samples: int | None = None
) -> Iterator[Batch]:
    """This process's batches of a source's validation split: every sample once over all processes, unshuffled, the same each time.

    Every process gets the same number of batches, as sharded engines need; what is missing is filled with samples without targets.
    """
    source = next(source for source in config.sources if source.name == name)
    dataset = PackedDataset(source.path, config.validation_split, config.sequence_length, "concat", pad_tail=True)
    count = min(len(dataset), max_samples or len(dataset))
    block = world_size * micro_batch_size
    empty = Sample(np.zeros(config.sequence_length + 1, dtype=np.int64), np.full(config.sequence_length + 1, -1, dtype=np.int32))
    try:
        for start in range(0, count, block):
            ids = range(start + rank * micro_batch_size, start + (rank + 1) * micro_batch_size)
            samples = [dataset[i] if i < count else empty for i in ids]
            yield collate(samples, [i if i < count else -1 for i in ids], config.mask_cross_document)
    finally:
        dataset.stream.close()
