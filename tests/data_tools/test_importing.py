"""Token files of other tools: the same documents come out."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from data_tools import importing
from data_tools.importing import import_tokens
from data_tools.indexed import IndexedDataset
from data_tools.tokenizers import load_tokenizer
from data_tools.verification import verify


@pytest.fixture
def documents(tokenizers) -> list[list[int]]:
    eos = load_tokenizer(tokenizers["sentencepiece"]).eos_id
    rng = np.random.default_rng(0)
    return [[*rng.integers(3, 700, rng.integers(1, 40)).tolist(), eos] for _ in range(60)]


def write_megatron(path, documents) -> None:
    """Two sequences a document, as sentence-splitting preprocessing writes."""
    sequences = [part for document in documents for part in (document[:1], document[1:])]
    lengths = [len(sequence) for sequence in sequences]
    pointers = (np.cumsum([0, *lengths[:-1]]) * 4).tolist()
    path.with_suffix(".bin").write_bytes(np.concatenate(sequences).astype("<i4").tobytes())
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 4, len(sequences), len(documents) + 1)
    body = struct.pack(f"<{len(lengths)}i", *lengths) + struct.pack(f"<{len(lengths)}q", *pointers)
    path.write_bytes(header + body + struct.pack(f"<{len(documents) + 1}q", *range(0, len(sequences) + 1, 2)))


def write_datatrove(path, documents, metadata: bool) -> None:
    path.write_bytes(np.concatenate(documents).astype("<u4" if metadata else "<u2").tobytes())
    path.with_name("a.ds.index").write_bytes(np.cumsum([len(d) for d in documents]).astype("<u8").tobytes())
    if metadata:
        path.with_name("a.ds.metadata").write_text("gpt2|4\n1000\n1K")


FILES = {
    "a.npy": lambda path, documents: np.save(path, np.concatenate(documents).astype(np.int64)),
    "a.bin": lambda path, documents: path.write_bytes(np.concatenate(documents).astype("<u2").tobytes()),
    "a.idx": write_megatron,
    "a.ds": lambda path, documents: write_datatrove(path, documents, metadata=False),
    "metadata/a.ds": lambda path, documents: write_datatrove(path, documents, metadata=True),
}


@pytest.mark.parametrize("at_once", [1 << 22, 50], ids=["whole", "pieces"])
@pytest.mark.parametrize("name", FILES)
def test_the_same_documents_come_out(tmp_path, tokenizers, documents, name, at_once, monkeypatch):
    monkeypatch.setattr(importing, "TOKENS_AT_ONCE", at_once)
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    FILES[name](path, documents)
    dtype = "uint16" if name == "a.bin" else None
    import_tokens([path], str(tokenizers["sentencepiece"]), tmp_path / "out", dtype=dtype)
    data = IndexedDataset(tmp_path / "out" / "train" / "00000")
    assert [data[i].tolist() for i in range(len(data))] == documents
    assert verify(tmp_path / "out", inputs=True) == []


def test_a_dump_that_ends_within_a_document(tmp_path, tokenizers, documents):
    np.save(tmp_path / "a.npy", np.concatenate([*documents, [5, 6]]))
    manifest = import_tokens([tmp_path / "a.npy"], str(tokenizers["sentencepiece"]), tmp_path / "out", split="validation")
    assert manifest.splits["validation"].documents == len(documents) + 1
