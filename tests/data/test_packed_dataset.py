"""A split is one stream whatever its shards, and boundaries are found without reading the index."""

from __future__ import annotations

import bisect
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.errors import UserError
from data_tools.indexed import HEADER, MAGIC, index_bytes
from data_tools.manifest import Manifest
from mamba_pretrain.data.packed_dataset import TokenStream, upper_bound
from mamba_pretrain.data.storage import DatasetFolder


def open_stream(folder, split="train") -> TokenStream:
    return TokenStream(DatasetFolder(str(folder)), split)


@settings(max_examples=100, deadline=None)
@given(steps=st.lists(st.integers(0, 10**6), min_size=1, max_size=3000), data=st.data())
def test_upper_bound_is_bisection(steps, data):
    values = [0, *np.cumsum(steps).tolist()]
    key = data.draw(st.one_of(st.sampled_from(values), st.integers(0, values[-1])))
    assert upper_bound(values, key, values[-1]) == bisect.bisect_right(values, key)


class Counted(list):
    """Counts the pages of 512 values that are looked at."""

    def __init__(self, values):
        super().__init__(values)
        self.pages = set()

    def __getitem__(self, index):
        self.pages.add(index // 512)
        return super().__getitem__(index)


def test_upper_bound_touches_few_pages():
    random = np.random.default_rng(0)
    lengths = random.lognormal(6, 1.5, 1_000_000).astype(np.int64)
    values = Counted(np.cumsum(lengths).tolist())
    touched = []
    for key in random.integers(0, values[-1], 100).tolist():
        values.pages.clear()
        upper_bound(values, key, values[-1])
        touched.append(len(values.pages))
    assert np.mean(touched) < 7  # bisection touches 11


def test_upper_bound_on_values_that_grow_very_unevenly():
    values = sorted([*(2**i for i in range(60)), *range(2**40, 2**40 + 5000)])
    for key in (0, 1, 2**40 + 17, 2**59, 2**45):
        assert upper_bound(values, key, values[-1]) == bisect.bisect_right(values, key)


def read(stream: TokenStream, first: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Ranges of the stream's tokens one after another."""
    reads = stream.locate(first, count, np.cumsum(count) - count)
    buffer = np.zeros(count.sum(), dtype=stream.dtype)
    stream.expect(reads)
    stream.read(reads, buffer)
    return buffer


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_reads_across_shards(make_dataset, read_stream, dtype):
    folder = make_dataset([5, 9, 2, 30, 1, 7, 7, 3], shards=[1, 2, 1, 2], dtype=dtype)
    tokens, _ = read_stream(folder)
    stream = open_stream(folder)
    assert (stream.n_tokens, stream.n_documents, stream.dtype) == (64, 8, np.dtype(dtype))
    firsts, counts = np.meshgrid(np.arange(64), np.arange(1, 65))
    keep = firsts + counts <= 64
    found = read(stream, firsts[keep], counts[keep])
    expected = [tokens[first : first + count] for first, count in zip(firsts[keep], counts[keep], strict=True)]
    assert np.array_equal(found, np.concatenate(expected))
    assert read(stream, np.zeros(0, np.int64), np.zeros(0, np.int64)).tolist() == []


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=40), data=st.data())
def test_document_starts(make_dataset, read_stream, lengths, data):
    shards = data.draw(st.lists(st.integers(1, 10), max_size=4))
    folder = make_dataset(lengths, shards=shards)
    stream = open_stream(folder)
    starts = np.cumsum([0, *lengths])[:-1]
    assert stream.document_starts(np.arange(len(lengths))).tolist() == starts.tolist()
    assert stream.document_lengths().tolist() == lengths
    first = data.draw(st.integers(0, stream.n_tokens - 1))
    length = data.draw(st.integers(0, stream.n_tokens - first))
    rows, columns = stream.starts_within(np.array([first, first]), np.array([length, length]))
    expected = [start - first for start in starts.tolist() if first < start <= first + length]
    assert columns[rows == 0].tolist() == columns[rows == 1].tolist() == expected


def test_documents_of_several_sequences_as_megatron_allows(make_dataset):
    """Boundaries are those of documents, not of sequences."""
    folder = make_dataset([4, 6, 5, 5])
    path = folder / "train" / "00000.idx"
    content = bytearray(path.read_bytes())
    body = index_bytes(np.array([4, 6, 5, 5]), np.dtype(np.uint16))
    head = HEADER.pack(MAGIC, 1, 8, 4, 3)
    path.write_bytes(head + body[HEADER.size : -8 * 5] + np.array([0, 2, 4]).tobytes())
    assert len(path.read_bytes()) == len(content) - 16
    stream = open_stream(folder)
    assert stream.n_documents == 2
    assert stream.document_starts(np.arange(2)).tolist() == [0, 10]
    assert stream.document_lengths().tolist() == [10, 10]
    assert stream.starts_within(np.array([0]), np.array([19]))[1].tolist() == [10]


def test_empty_shards_are_passed_over(make_dataset, read_stream):
    folder = make_dataset([5, 6], shards=[0, 1, 0])
    stream = open_stream(folder)
    assert np.array_equal(read(stream, np.array([0]), np.array([11])), read_stream(folder)[0])


def shard_of(lengths: list[int], dtype: type[np.generic]) -> dict[str, bytes]:
    """The two files of a well-formed shard."""
    return {"idx": index_bytes(np.array(lengths), np.dtype(dtype)), "bin": bytes(sum(lengths) * np.dtype(dtype).itemsize)}


# What is done to the files (None: deleted, a number: truncated to so many bytes), and words of the error.
DAMAGES = {
    "no manifest": ({"manifest.json": None}, ["manifest.json", "mamba-data tokenize"]),
    "no bin": ({"train/00000.bin": None}, ["00000.bin", "does not exist"]),
    "no idx": ({"train/00000.idx": None}, ["00000.idx", "does not exist"]),
    "truncated bin": ({"train/00000.bin": 7}, ["00000.bin", "truncated"]),
    "truncated idx": ({"train/00000.idx": 60}, ["00000.idx", "truncated"]),
    "another shard": ({f"train/00000.{kind}": data for kind, data in shard_of([7], np.uint16).items()}, ["00000.bin", "7 tokens"]),
    "another dtype": ({f"train/00001.{kind}": data for kind, data in shard_of([6], np.int32).items()}, ["00001.bin", "int32"]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_dataset_is_named_in_one_sentence(make_dataset, damage):
    folder = make_dataset([5, 6], shards=[1])
    changes, words = DAMAGES[damage]
    for name, change in changes.items():
        if change is None:
            (folder / name).unlink()
        elif isinstance(change, int):
            os.truncate(folder / name, change)
        else:
            (folder / name).write_bytes(change)
    with pytest.raises(UserError) as error:
        open_stream(folder)
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)


def test_a_split_that_is_not_there(make_dataset):
    with pytest.raises(UserError, match="has no split 'validation', it has: train"):
        open_stream(make_dataset([5]), "validation")


def test_an_empty_split(make_dataset):
    folder = make_dataset([], shards=[])
    assert Manifest.load(folder).splits["train"].tokens == 0
    with pytest.raises(UserError, match="is empty"):
        open_stream(folder)


def test_a_file_that_shrinks_while_it_is_read(make_dataset):
    folder = make_dataset([50])
    stream = open_stream(folder)
    os.truncate(folder / "train" / "00000.bin", 20)
    with pytest.raises(UserError, match=r"00000\.bin ends before byte 100"):
        read(stream, np.array([0]), np.array([50]))
