"""The training and validation data of a run, as each rank sees it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_tools.errors import UserError
from data_tools.memory import keep_freed_memory
from mamba_pretrain.data.batch import Batch
from mamba_pretrain.data.blend import BlendSchedule
from mamba_pretrain.data.config import DataConfig, EvaluatedSource
from mamba_pretrain.data.sampling import Expected, Sampler, Source, padded_batch
from mamba_pretrain.data.storage import DatasetFolder


class TrainingData:
    """The training samples of a run: which ones make a global batch is a pure function of the datasets, the seed, the blends and its number.

    A range of global samples is cut into micro-steps of ``world_size * micro_batch_size`` samples; of each, rank r takes the r-th block of
    ``micro_batch_size``. What a global batch holds therefore depends neither on the world size nor on the micro-batch.
    """

    def __init__(self, config: DataConfig, seed: int, rank: int = 0, world_size: int = 1, micro_batch_size: int = 1) -> None:
        """Opens all sources. Raises UserError for missing or damaged datasets, mixed tokenizers and sequences longer than the data."""
        self.config = config
        self.sequence_length = config.sequence_length
        self.last_wait_seconds = 0.0
        self._seed = seed
        self._rank = rank
        self._micro_step = world_size * micro_batch_size
        self._micro_batch = micro_batch_size
        self._sampler = Sampler(config, seed)
        self._blend = BlendSchedule.constant(self._sampler.weights)
        self._next_sample = 0
        keep_freed_memory()
        self._threads = ThreadPoolExecutor(config.workers, thread_name_prefix="data", initializer=_device_setter())
        self._pending: dict[int, tuple[Future[list[Batch]], int]] = {}  # first sample of a micro-batch -> (group being read, place in it)
        self._pin = torch.cuda.is_available()

    @property
    def fingerprint(self) -> str:
        """Hash of the tokens and tokenizers of all sources."""
        return self._sampler.fingerprint

    @property
    def vocab_size(self) -> int:
        """Of the tokenizer: every id is below it."""
        return self._sampler.sources[0].folder.manifest.tokenizer.vocab_size

    @property
    def tokenizer_dir(self) -> Path:
        """Folder with the tokenizer's files."""
        return self._sampler.sources[0].folder.tokenizer_dir

    @property
    def total_samples(self) -> dict[str, int]:
        """Samples of one epoch, by source."""
        return {source.name: source.n_samples for source in self._sampler.sources}

    @property
    def padding_fraction(self) -> dict[str, float]:
        """Share of the places that hold padding, by source."""
        return {source.name: source.n_padding / (source.n_samples * self.sequence_length) for source in self._sampler.sources}

    def samples_drawn(self) -> dict[str, int]:
        """Samples taken so far by all ranks, by source; divided by ``total_samples`` these are epochs."""
        cursors = self._blend.cursors_at(self._next_sample)
        return {source.name: cursors.get(source.key, 0) for source in self._sampler.sources}

    def take(self, first_sample: int, n_samples: int) -> list[Batch]:
        """This rank's micro-batches of global samples ``first_sample ... first_sample + n_samples - 1``; reads ahead as many samples after them.

        Raises UserError when ``n_samples`` is no multiple of world size times micro-batch, and whatever went wrong while reading.
        """
        if n_samples <= 0 or n_samples % self._micro_step:
            raise UserError(
                f"a global batch of {n_samples} sequences is not divisible by world size x micro-batch = {self._micro_step}; "
                "change train.global_batch_size or train.micro_batch_size"
            )
        asked = time.perf_counter()
        end = first_sample + n_samples
        wanted = self._starts(first_sample, end)
        ahead = self._starts(end, end + n_samples)
        self._forget_all_but({*wanted, *ahead})
        self._schedule(wanted)
        self._schedule(ahead)
        groups = [self._pending.pop(start) for start in wanted]
        batches = [group.result()[place] for group, place in groups]
        self._next_sample = end
        self.last_wait_seconds = time.perf_counter() - asked
        return batches

    def _starts(self, first: int, end: int) -> list[int]:
        """First sample of each of this rank's micro-batches in a range."""
        return [start + self._rank * self._micro_batch for start in range(first, end, self._micro_step)]

    def _schedule(self, starts: list[int]) -> None:
        """Has the micro-batches read that are not being read already, in groups large enough to keep a disk busy.

        Each group is announced to the disk before the one before it is read, so that the disk works while that one is assembled.
        """
        missing = [start for start in starts if start not in self._pending]
        size = max(1, self.config.read_ahead // self._micro_batch)
        groups = [missing[i : i + size] for i in range(0, len(missing), size)]
        expected = [self._threads.submit(self._expect, group) for group in groups[:1]]
        for i, group in enumerate(groups):
            expected += [self._threads.submit(self._expect, following) for following in groups[i + 1 : i + 2]]
            future = self._threads.submit(self._read, expected[i], group)
            self._pending.update({start: (future, place) for place, start in enumerate(group)})

    def _samples(self, starts: list[int]) -> np.ndarray:
        """The samples (m,) of micro-batches that begin at ``starts``."""
        return (np.array(starts)[:, None] + np.arange(self._micro_batch)).reshape(-1)

    def _expect(self, starts: list[int]) -> list[tuple[np.ndarray, Expected]]:
        samples = self._samples(starts)
        return self._sampler.expect(self._blend.place(samples), samples)

    def _read(self, expected: Future[list[tuple[np.ndarray, Expected]]], starts: list[int]) -> list[Batch]:
        # Threads take what is submitted in turn, so that what is waited for here has begun.
        batch = self._sampler.read(expected.result(), self._samples(starts))
        batches = [batch.rows(slice(i * self._micro_batch, (i + 1) * self._micro_batch)) for i in range(len(starts))]
        return [micro_batch.pinned() for micro_batch in batches] if self._pin else batches

    def _forget_all_but(self, starts: set[int]) -> None:
        for start in self._pending.keys() - starts:
            self._pending.pop(start)[0].cancel()

    def state(self) -> dict[str, Any]:
        """Integers and names only: what the order depends on, and the blends so far."""
        return {
            "seed": self._seed,
            "sequence_length": self.sequence_length,
            "packing": self.config.packing,
            "blend": self._blend.state(),
        }

    def load(self, state: dict[str, Any], sample: int) -> bool:
        """Continues a run whose next sample is ``sample``. A blend that differs from the last one begins there, and each source goes on from
        where it stood, so that nothing is repeated or lost. Returns whether it does.

        Raises UserError when the order is another one (seed, sequence length, packing).
        """
        for key, mine in self.state().items():
            if key != "blend" and state[key] != mine:
                name = key if key == "seed" else f"data.{key}"
                raise UserError(
                    f"the run read its data with {name}={state[key]}, and now it is {mine}: samples would be repeated and lost; "
                    f"set {name}={state[key]}, or start a new run from the weights with train.init_from"
                )
        self._forget_all_but(set())
        self._next_sample = sample
        saved = BlendSchedule.from_state(state["blend"])
        self._blend = saved.followed_by(self._sampler.weights, sample)
        return self._blend is not saved

    def close(self) -> None:
        """Stops the threads and closes the files; may be called twice."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._pending.clear()
        self._sampler.close()


def _device_setter() -> Callable[[], None] | None:
    """What a thread does first: the current GPU is each thread's own, and pinning memory would otherwise occupy GPU 0 from every rank."""
    return partial(torch.cuda.set_device, torch.cuda.current_device()) if torch.cuda.is_available() else None


def validation_names(config: DataConfig) -> list[str]:
    """Names of the sources that have something to evaluate on."""

    def has_validation(source: EvaluatedSource) -> bool:
        split = DatasetFolder(source.path, config.cache_dir).manifest.splits.get(config.validation_split)
        return split is not None and split.tokens >= 2

    return [source.name for source in config.evaluated_sources if has_validation(source)]


def find_source(config: DataConfig, name: str) -> EvaluatedSource:
    """The source called ``name``; UserError if there is none."""
    for source in config.evaluated_sources:
        if source.name == name:
            return source
    raise UserError(f"no data source is called {name!r}; there are: {', '.join(source.name for source in config.evaluated_sources)}")


def dataset_folder(config: DataConfig, name: str) -> DatasetFolder:
    """The opened folder of the source called ``name``; UserError if there is none."""
    return DatasetFolder(find_source(config, name).path, config.cache_dir)


def bytes_per_token(config: DataConfig, name: str) -> float | None:
    """UTF-8 bytes of text per token in the validation split of the source called ``name``; None if the dataset does not record it."""
    split = dataset_folder(config, name).manifest.splits.get(config.validation_split)
    return split.text_bytes / split.tokens if split and split.tokens and split.text_bytes else None


def validation_batches(
    config: DataConfig, name: str, rank: int = 0, world_size: int = 1, micro_batch_size: int = 1, max_samples: int | None = None
) -> Iterator[Batch]:
    """This rank's batches of the validation split of the source called ``name``: the same samples every time, each exactly once over all ranks.

    ``max_samples`` spreads evenly over the split. Every rank gets the same number of batches: what is missing at the end is padding without
    targets. ``sample_ids`` number the split's sequences.
    """
    source = Source.for_validation(config, find_source(config, name))
    count = min(source.n_samples, max_samples or source.n_samples)
    samples = np.arange(count) * source.n_samples // max(1, count)
    try:
        for micro_step in range(0, count, world_size * micro_batch_size):
            start = micro_step + rank * micro_batch_size
            yield padded_batch(source, samples[start : start + micro_batch_size], micro_batch_size, config.sequence_length)
    finally:
        source.close()
