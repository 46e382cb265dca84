"""The .bin/.idx format, against a writer and a reader that share no code with it."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.errors import UserError
from data_tools.indexed import IndexedDataset, IndexedWriter, best_dtype, paths

CODES = {"uint16": (8, "H"), "int32": (4, "i")}


def golden(documents: list[list[int]], dtype: str) -> tuple[bytes, bytes]:
    """The two files as the format is defined, value by value."""
    code, letter = CODES[dtype]
    size = struct.calcsize(letter)
    body = b"".join(struct.pack("<" + letter, token) for document in documents for token in document)
    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(documents), len(documents) + 1)
    index += b"".join(struct.pack("<i", len(document)) for document in documents)
    pointer = 0
    for document in documents:
        index += struct.pack("<q", pointer)
        pointer += len(document) * size
    index += b"".join(struct.pack("<q", number) for number in range(len(documents) + 1))
    return body, index


def write(prefix: Path, documents: list[list[int]], dtype: str, per_call: int = 3) -> None:
    with IndexedWriter(prefix, np.dtype(dtype)) as writer:
        for i in range(0, len(documents), per_call):
            group = documents[i : i + per_call]
            writer.add(np.array([token for document in group for token in document], dtype=np.int64), [len(d) for d in group])


@settings(max_examples=40, deadline=None)
@given(
    documents=st.lists(st.lists(st.integers(0, 65535), min_size=1, max_size=20), max_size=20), dtype=st.sampled_from(["uint16", "int32"])
)
def test_bytes_are_those_of_the_format(tmp_path_factory, documents, dtype):
    prefix = tmp_path_factory.mktemp("golden") / "00000"
    write(prefix, documents, dtype)
    assert tuple(path.read_bytes() for path in paths(prefix)) == golden(documents, dtype)
    data = IndexedDataset(prefix)
    assert [data[i].tolist() for i in range(len(data))] == documents
    assert [int(x) for x in data.documents] == list(range(len(documents) + 1))
    batches = [(tokens.tolist(), lengths.tolist()) for tokens, lengths in data.batches(tokens=7)]
    assert [token for tokens, _ in batches for token in tokens] == [token for document in documents for token in document]
    assert [length for _, lengths in batches for length in lengths] == [len(document) for document in documents]


def test_checksums_are_of_the_bytes_on_disk(tmp_path):
    import xxhash

    with IndexedWriter(tmp_path / "a", np.uint16) as writer:
        writer.add(np.arange(1000), [400, 600])
    for path, digest in zip(paths(tmp_path / "a"), (writer.xxh3_bin, writer.xxh3_idx), strict=True):
        assert xxhash.xxh3_128_hexdigest(path.read_bytes()) == digest


def test_reads_any_range(tmp_path):
    write(tmp_path / "a", [[1, 2, 3], [4, 5], [6]], "uint16")
    data = IndexedDataset(tmp_path / "a")
    assert data.read(2, 3).tolist() == [3, 4, 5]
    assert (data.n_tokens, data.dtype, data.document_starts().tolist()) == (6, np.uint16, [0, 3, 5])
    with pytest.raises(UserError, match="ended early at token 6"):
        data.read(4, 5)


@pytest.mark.parametrize("vocabulary", [(65_499, "uint16"), (65_500, "int32")])
def test_dtype_follows_the_vocabulary(vocabulary):
    assert best_dtype(vocabulary[0]) == np.dtype(vocabulary[1])


def test_an_error_while_writing_leaves_nothing(tmp_path):
    with pytest.raises(ValueError), IndexedWriter(tmp_path / "a", np.uint16) as writer:
        writer.add(np.arange(3), [2])
    assert not list(tmp_path.iterdir())


def damage_magic(index: bytes) -> bytes:
    return b"NOTMAGIC" + index[8:]


def damage_version(index: bytes) -> bytes:
    return index[:9] + struct.pack("<Q", 2) + index[17:]


def damage_dtype(index: bytes) -> bytes:
    return index[:17] + b"\x63" + index[18:]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (damage_magic, "first bytes are wrong"),
        (damage_version, "version 2"),
        (damage_dtype, "dtype code 99"),
        (lambda index: index[:-8], "truncated"),
        (lambda index: index[:20], "first bytes are wrong"),
        (lambda index: index + b"x", "truncated or damaged"),
    ],
)
def test_damaged_indices_are_refused(tmp_path, damage, said):
    write(tmp_path / "a", [[1, 2, 3], [4]], "uint16")
    index = tmp_path / "a.idx"
    index.write_bytes(damage(index.read_bytes()))
    with pytest.raises(UserError, match=said):
        IndexedDataset(tmp_path / "a")


def test_a_truncated_or_missing_bin_is_refused(tmp_path):
    write(tmp_path / "a", [[1, 2, 3], [4]], "uint16")
    body = tmp_path / "a.bin"
    body.write_bytes(body.read_bytes()[:-2])
    with pytest.raises(UserError, match="has 6 bytes, but its index describes 8"):
        IndexedDataset(tmp_path / "a")
    body.unlink()
    with pytest.raises(UserError, match="does not exist"):
        IndexedDataset(tmp_path / "a")


def test_opening_does_not_read_the_index(tmp_path):
    """A hundred million documents open at once: the file is sparse, so reading it whole would take seconds and gigabytes."""
    import resource
    import time

    n = 100_000_000
    with (tmp_path / "a.idx").open("wb") as file:
        file.write(b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, n, n + 1))
        file.truncate(34 + 20 * n + 8)
    (tmp_path / "a.bin").touch()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.monotonic()
    assert len(IndexedDataset(tmp_path / "a")) == n
    assert time.monotonic() - began < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB
