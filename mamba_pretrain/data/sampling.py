"""From numbers of samples to batches: sources opened and checked, sequences read and assembled. No threads, no ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from data_tools.errors import UserError
from mamba_pretrain.data.batch import Batch, assemble, empty_batch
from mamba_pretrain.data.config import DataConfig, EvaluatedSource
from mamba_pretrain.data.order import SampleOrder
from mamba_pretrain.data.packed_dataset import TokenStream
from mamba_pretrain.data.packing import BestFitPacking, ConcatPacking, Layout, Packing
from mamba_pretrain.data.storage import DatasetFolder, Reads


@dataclass(frozen=True)
class Expected:
    """Samples of one source that are on their way."""

    source: Source
    layout: Layout
    reads: Reads


class Source:
    """One split of one dataset, packed: samples by number."""

    def __init__(
        self, config: DataConfig, source: EvaluatedSource, split: str, packing: Packing, stream: TokenStream, folder: DatasetFolder
    ):
        self.name = source.name
        self.folder = folder
        self.key = f"{folder.manifest.fingerprint}/{split}"
        self._stream = stream
        self._packing = packing
        self._length = config.sequence_length
        self._mask = config.mask_cross_document or config.packing == "best-fit"

    @classmethod
    def for_training(cls, config: DataConfig, source: EvaluatedSource) -> Source:
        """The training split, packed as configured. Raises UserError when it holds no whole sequence."""
        folder = DatasetFolder(source.path, config.cache_dir)
        stream = TokenStream(folder, config.train_split)
        packing: Packing
        packing = (
            BestFitPacking(stream, config.sequence_length)
            if config.packing == "best-fit"
            else ConcatPacking(stream, config.sequence_length)
        )
        if stream.n_tokens <= config.sequence_length:
            raise UserError(
                f"data.sequence_length {config.sequence_length} is longer than the split {config.train_split!r} of {source.path}, which has "
                f"{stream.n_tokens} tokens; set data.sequence_length to at most {max(1, stream.n_tokens - 1)} or tokenize more text"
            )
        return cls(config, source, config.train_split, packing, stream, folder)

    @classmethod
    def for_validation(cls, config: DataConfig, source: EvaluatedSource) -> Source:
        """The validation split in its own order, concatenated, the tail included."""
        folder = DatasetFolder(source.path, config.cache_dir)
        stream = TokenStream(folder, config.validation_split)
        packing = ConcatPacking(stream, config.sequence_length, keep_tail=True)
        return cls(config, source, config.validation_split, packing, stream, folder)

    @property
    def n_samples(self) -> int:
        """Samples of one epoch."""
        return self._packing.n_samples

    @property
    def n_padding(self) -> int:
        """Places of one epoch that hold padding."""
        return self._packing.n_padding

    def expect(self, samples: np.ndarray) -> Expected:
        """Finds samples (m,) of this source and has their bytes be on their way."""
        layout = self._packing.layout(samples)
        reads = self._stream.locate(layout.first, layout.count, layout.row * (self._length + 1) + layout.column)
        self._stream.expect(reads)
        return Expected(self, layout, reads)

    def read(self, expected: Expected, sample_ids: np.ndarray) -> Batch:
        """The expected samples (m,) as a batch that names them ``sample_ids`` (m,)."""
        buffer = np.zeros((len(sample_ids), self._length + 1), dtype=self._stream.dtype)
        self._stream.read(expected.reads, buffer)
        return assemble(expected.layout, buffer, sample_ids, self._mask)

    def batch(self, samples: np.ndarray, sample_ids: np.ndarray) -> Batch:
        """Samples (m,) of this source as a batch that names them ``sample_ids`` (m,)."""
        return self.read(self.expect(samples), sample_ids)

    def close(self) -> None:
        """Closes the files."""
        self._stream.close()


class Sampler:
    """Batches of any global samples: places each in the blend, finds it in its source's order, reads it. Safe to use from several threads."""

    def __init__(self, config: DataConfig, seed: int) -> None:
        self.sources = [Source.for_training(config, source) for source in config.sources]
        check_tokenizers(self.sources)
        self.weights = {source.key: entry.weight for source, entry in zip(self.sources, config.sources, strict=True)}
        if len(self.weights) < len(self.sources):
            raise UserError("data.sources names the same dataset twice; name it once, with a greater weight")
        self._by_key = {source.key: source for source in self.sources}
        self._orders = {source.key: SampleOrder(source.n_samples, f"{source.key}:{seed}", config.shuffle) for source in self.sources}
        self._order_name = f"{config.packing}:{config.sequence_length}:{config.shuffle}:{seed}"

    def expect(self, placed: Iterable[tuple[str, np.ndarray, np.ndarray]], sample_ids: np.ndarray) -> list[tuple[np.ndarray, Expected]]:
        """Finds global samples (m,), placed in the blend as (source, rows, draws), and has their bytes be on their way: (rows, samples) by source."""
        expected = []
        for key, rows, draws in placed:
            if key not in self._by_key:
                raise UserError(f"sample {sample_ids[rows[0]]} comes from a dataset that data.sources no longer names; add it again")
            expected.append((rows, self._by_key[key].expect(self._orders[key].samples(draws))))
        return expected

    def read(self, expected: list[tuple[np.ndarray, Expected]], sample_ids: np.ndarray) -> Batch:
        """The expected global samples (m,) as a batch."""
        parts = [samples.source.read(samples, sample_ids[rows]) for rows, samples in expected]
        if len(parts) == 1:
            return parts[0]
        order = np.argsort(np.concatenate([rows for rows, _ in expected]))
        return Batch.concatenate(parts).rows(torch.from_numpy(order))

    @property
    def fingerprint(self) -> str:
        """Hash of everything that decides which sample is which, but for the weights, which may change."""
        return hashlib.sha256(";".join([self._order_name, *sorted(self._by_key)]).encode()).hexdigest()[:32]

    def close(self) -> None:
        """Closes all sources."""
        for source in self.sources:
            source.close()


def check_tokenizers(sources: Sequence[Source]) -> None:
    """Raises UserError unless all sources were made with the same tokenizer."""
    first = sources[0]
    for source in sources[1:]:
        if source.folder.manifest.tokenizer.hash != first.folder.manifest.tokenizer.hash:
            raise UserError(
                f"{source.folder.path} was made with another tokenizer than {first.folder.path}, so their ids mean different things; "
                "tokenize one of them again"
            )


def padded_batch(source: Source, samples: np.ndarray, rows: int, length: int) -> Batch:
    """The samples (m,), m <= rows, and rows of padding after them."""
    if len(samples) == 0:
        return empty_batch(rows, length)
    batch = source.batch(samples, samples)
    return batch if len(samples) == rows else Batch.concatenate([batch, empty_batch(rows - len(samples), length)])
