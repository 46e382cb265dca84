"""Merge and split: no document is lost, and choices do not depend on where documents stand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data_tools.errors import UserError
from data_tools.indexed import IndexedDataset
from data_tools.manifest import Manifest
from data_tools.merging import merge, split
from data_tools.pipeline import tokenize
from data_tools.sources import find_files, plan_tasks
from data_tools.verification import verify
from data_tools.worker import Options


@pytest.fixture
def make(tmp_path, tokenizers, write_jsonl):
    """Makes a dataset of texts."""

    def make(name: str, texts: list[str], **options) -> Path:
        source = write_jsonl(tmp_path / f"{name}.jsonl", texts)
        options.setdefault("tokenizer", str(tokenizers["sentencepiece"]))
        tokenize(plan_tasks(find_files([str(source)], [], [])), Options(**options), tmp_path / name, 1)
        return tmp_path / name

    return make


def documents(folder: Path, split: str) -> list[tuple[int, ...]]:
    shards = Manifest.load(folder).splits[split].shards if split in Manifest.load(folder).splits else []
    return [tuple(data[i].tolist()) for shard in shards for data in [IndexedDataset(folder / shard.path)] for i in range(len(data))]


def test_merge_keeps_every_document_in_order(tmp_path, texts, make):
    a, b = make("a", texts[:50], validation_fraction=0.2), make("b", texts[50:90])
    merged = merge([a, b], tmp_path / "out")
    assert documents(tmp_path / "out", "train") == documents(a, "train") + documents(b, "train")
    assert documents(tmp_path / "out", "validation") == documents(a, "validation")
    assert merged.counts["documents"] == 90
    assert [row["path"] for row in merged.inputs] == [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    assert verify(tmp_path / "out", inputs=True) == []


def test_merge_drops_duplicates_of_training_documents_first(tmp_path, texts, make):
    a = make("a", [*texts[:40], texts[3], texts[3]])
    b = make("b", texts[30:60], validation_fraction=0.4)
    merged = merge([a, b], tmp_path / "out", dedup=True)
    train, validation = documents(tmp_path / "out", "train"), documents(tmp_path / "out", "validation")
    assert len(set(train + validation)) == len(train + validation) == 60
    assert set(train) == set(documents(a, "train")) | set(documents(b, "train"))
    assert merged.counts["duplicates"] == 2 + 10
    assert merged.splits["train"].text_bytes + merged.splits["validation"].text_bytes == sum(len(text.encode()) for text in texts[:60])
    assert verify(tmp_path / "out") == []


def test_split_is_stable_under_resharding(tmp_path, texts, make):
    texts = list(dict.fromkeys(texts))[:120]
    a, b, c = make("a", texts), make("b", texts[60:]), make("c", texts[:60])
    merge([b, c], tmp_path / "bc")
    whole = split(a, tmp_path / "one", 0.3, seed=1)
    split(tmp_path / "bc", tmp_path / "two", 0.3, seed=1)
    split(a, tmp_path / "other-seed", 0.3, seed=2)
    chosen = set(documents(tmp_path / "one", "validation"))
    assert chosen == set(documents(tmp_path / "two", "validation")) != set(documents(tmp_path / "other-seed", "validation"))
    assert set(documents(tmp_path / "one", "train")) == set(documents(a, "train")) - chosen
    assert 15 < len(chosen) < 60
    assert sum(s.text_bytes for s in whole.splits.values()) == Manifest.load(a).splits["train"].text_bytes
    assert verify(tmp_path / "one") == []


def test_split_of_a_split_dataset_keeps_its_validation(tmp_path, texts, make):
    a = make("a", texts[:80], validation_fraction=0.1)
    split(a, tmp_path / "out", 0.2, seed=9)
    assert set(documents(a, "validation")) < set(documents(tmp_path / "out", "validation"))


def test_datasets_that_do_not_fit_are_refused(tmp_path, texts, make, tokenizers):
    a = make("a", texts[:5])
    with pytest.raises(UserError, match="different tokenizers"):
        merge([a, make("b", texts[:5], tokenizer=str(tokenizers["hf"]))], tmp_path / "out")
    with pytest.raises(UserError, match="differ in append_eos"):
        merge([a, make("c", texts[:5], append_eos=False)], tmp_path / "out")
    with pytest.raises(UserError, match="--overwrite"):
        merge([a], a)
    assert not (tmp_path / "out").exists()


def test_a_missing_shard_stops_a_merge_and_leaves_nothing(tmp_path, texts, make):
    a = make("a", texts[:5])
    (a / "train" / "00000.bin").unlink()
    with pytest.raises(UserError, match=r"00000\.bin is missing"):
        merge([a], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_hashes_are_compared_in_bounded_memory(tmp_path, monkeypatch):
    """Many ranges of hash values give what one gives."""
    from data_tools import dedup

    rng = np.random.default_rng(0)
    hashes = np.zeros(5000, dtype=dedup.HASH)
    hashes["high"] = rng.integers(0, 1500, 5000).astype(np.uint64) * np.uint64(1 << 53)
    files = [tmp_path / str(i) for i in range(3)]
    for file, part in zip(files, (hashes[:2000], hashes[2000:2000], hashes[2000:]), strict=True):
        part.tofile(file)

    def found() -> set[tuple[int, int]]:
        return {(file, place) for file, places in dedup.duplicates(files) for place in places.tolist()}

    whole = found()
    seen: set[int] = set()
    expected = set()
    for i, value in enumerate(hashes["high"].tolist()):
        if value in seen:
            expected.add((0, i) if i < 2000 else (2, i - 2000))
        seen.add(value)
    assert whole == expected
    monkeypatch.setattr(dedup, "HASHES_AT_ONCE", 100)
    assert found() == expected
