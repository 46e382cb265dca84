"""Megatron-LM itself reads what is written here, and writes the same bytes for the same ids."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from data_tools.indexed import IndexedDataset, IndexedWriter, best_dtype
from data_tools.manifest import Manifest
from data_tools.tokenizers import load_tokenizer

if importlib.util.find_spec("megatron") is None:
    pytest.skip("megatron-core is not installed: pip install megatron-core, and what it imports, to run these", allow_module_level=True)


@pytest.fixture(scope="module")
def megatron():
    from megatron.core.datasets import indexed_dataset

    return indexed_dataset


@pytest.fixture
def dataset(tmp_path, texts, write_jsonl, tokenizers, mamba_data) -> Path:
    source = write_jsonl(tmp_path / "a.jsonl", texts[:300])
    assert mamba_data("tokenize", source, "--tokenizer", tokenizers["hf"], "--output", tmp_path / "out").code == 0
    return tmp_path / "out"


def test_megatron_reads_the_same_ids_and_boundaries(megatron, dataset, texts, tokenizers):
    tokenizer = load_tokenizer(tokenizers["hf"])
    expected = [[*ids.tolist(), tokenizer.eos_id] for ids in tokenizer.encode_batch(texts[:300])]
    found = []
    for shard in Manifest.load(dataset).splits["train"].shards:
        theirs = megatron.IndexedDataset(str(dataset / shard.path))
        assert theirs.document_indices.tolist() == list(range(shard.documents + 1))
        found += [theirs[i].tolist() for i in range(len(theirs))]
    assert found == expected


def test_the_bytes_are_megatrons_for_the_same_input(megatron, dataset, texts, tokenizers, tmp_path):
    """As its tools/preprocess_data.py does with --append-eod: one document a line, written by its own builder."""
    tokenizer = load_tokenizer(tokenizers["hf"])
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=megatron.DType.optimal_dtype(tokenizer.vocab_size))
    for ids in tokenizer.encode_batch(texts[:300]):
        builder.add_document([*ids.tolist(), tokenizer.eos_id], [len(ids) + 1])
    builder.finalize(str(tmp_path / "theirs.idx"))
    (shard,) = Manifest.load(dataset).splits["train"].shards
    for suffix in (".bin", ".idx"):
        assert Path(f"{dataset / shard.path}{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()


@pytest.mark.parametrize("vocabulary", [100, 65_499, 65_500, 65_501, 200_000])
def test_the_same_dtype_for_every_vocabulary(megatron, vocabulary):
    assert best_dtype(vocabulary) == np.dtype(megatron.DType.optimal_dtype(vocabulary))


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_any_documents(megatron, tmp_path, dtype):
    """Both ways: theirs read here, ours read there, equal bytes."""
    random = np.random.default_rng(0)
    lengths = random.integers(1, 50, 400)
    documents = [random.integers(0, 60_000, length) for length in lengths]
    with IndexedWriter(tmp_path / "ours", dtype) as writer:
        writer.add(np.concatenate(documents), lengths)
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    for document in documents:
        builder.add_document(document.tolist(), [len(document)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()
    ours, theirs = IndexedDataset(tmp_path / "theirs"), megatron.IndexedDataset(str(tmp_path / "ours"))
    for i, document in enumerate(documents):
        assert ours[i].tolist() == theirs[i].tolist() == document.tolist()
