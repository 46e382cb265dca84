"""Tiny datasets, written through the format's own writer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from data_tools.indexed import IndexedDataset, IndexedWriter
from data_tools.manifest import Manifest, Shard, Split, TokenizerInfo, xxh3

EOS = 0


def write_split(folder: Path, split: str, shards: Sequence[Sequence[np.ndarray]], dtype: type[np.generic]) -> Split:
    """Documents (arrays of ids), shard by shard."""
    found = Split()
    for number, documents in enumerate(shards):
        name = f"{split}/{number:05d}"
        with IndexedWriter(folder / name, dtype) as writer:
            tokens = np.concatenate([np.zeros(0, dtype=dtype), *documents])
            writer.add(tokens, [len(document) for document in documents])
        files = folder / f"{name}.bin", folder / f"{name}.idx"
        found.shards.append(Shard(name, len(documents), len(tokens), np.dtype(dtype).name, xxh3(files[0]), xxh3(files[1]), 3 * len(tokens)))
    return found


def write_dataset(
    folder: Path,
    train: Sequence[Sequence[np.ndarray]],
    validation: Sequence[Sequence[np.ndarray]] = (),
    tokenizer_hash: str = "t",
    vocab_size: int = 1000,
    dtype: type[np.generic] = np.uint16,
) -> Path:
    """A whole dataset folder with a manifest and a tokenizer file."""
    splits = {"train": write_split(folder, "train", train, dtype)}
    if validation:
        splits["validation"] = write_split(folder, "validation", validation, dtype)
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    tokenizer = TokenizerInfo("test", tokenizer_hash, vocab_size, EOS, None, files=["tokenizer.json"])
    Manifest(tokenizer=tokenizer, splits=splits).save(folder)
    return folder


def random_documents(lengths: Sequence[int], seed: int = 0, vocab_size: int = 1000) -> list[np.ndarray]:
    """Documents of random ids, each ending with EOS."""
    random = np.random.default_rng(seed)
    return [np.append(random.integers(1, vocab_size, length - 1), EOS).astype(np.uint16) for length in lengths]


def split_shards(documents: list[np.ndarray], sizes: Sequence[int]) -> list[list[np.ndarray]]:
    """The documents in shards of so many each; the last takes the rest."""
    shards, begin = [], 0
    for size in sizes:
        shards.append(documents[begin : begin + size])
        begin += size
    return [*shards, documents[begin:]]


def stream_of(folder: Path, split: str = "train") -> tuple[np.ndarray, np.ndarray]:
    """All tokens of a split and the number of the document of each, document by document."""
    tokens, owner, document = [], [], 0
    for shard in Manifest.load(folder).splits[split].shards:
        index = IndexedDataset(folder / shard.path)
        for i in range(len(index)):
            tokens.append(index[i].astype(np.int64))
            owner.append(np.full(len(index[i]), document))
            document += 1
    return np.concatenate(tokens), np.concatenate(owner)


@pytest.fixture(scope="session")
def make_dataset(tmp_path_factory) -> Callable[..., Path]:
    """Writes a dataset of random documents of the given lengths into a new folder.

    ``make_dataset(lengths, shards=[documents in the first shard, ...], validation=lengths, name=..., seed=..., **write_dataset's)``
    """

    def make(
        lengths: Sequence[int], shards: Sequence[int] = (), validation: Sequence[int] = (), name: str = "data", seed: int = 0, **settings
    ) -> Path:
        train = split_shards(random_documents(lengths, seed), shards)
        held_out = [random_documents(validation, seed + 1)] if validation else []
        return write_dataset(tmp_path_factory.mktemp("dataset") / name, train, held_out, **settings)

    return make


@pytest.fixture(scope="session")
def read_stream() -> Callable[..., tuple[np.ndarray, np.ndarray]]:
    """(tokens, document of each token) of a split, read the slow and simple way: ``read_stream(folder, split)``."""
    return stream_of
