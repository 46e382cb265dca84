"""verify finds what happened to a dataset."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from data_tools.indexed import IndexedWriter
from data_tools.manifest import Manifest
from data_tools.pipeline import tokenize
from data_tools.sources import find_files, plan_tasks
from data_tools.verification import verify
from data_tools.worker import Options


@pytest.fixture
def dataset(tmp_path, texts, tokenizers, write_jsonl):
    source = write_jsonl(tmp_path / "a.jsonl", texts[:80])
    options = Options(str(tokenizers["sentencepiece"]), validation_fraction=0.2)
    tokenize(plan_tasks(find_files([str(source)], [], [])), options, tmp_path / "data", 1)
    assert verify(tmp_path / "data", inputs=True) == []
    return tmp_path / "data"


def flip(path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("position", [0, 1001, -1])
@pytest.mark.parametrize("name", ["train/00000.bin", "train/00000.idx", "validation/00000.bin"])
def test_a_flipped_bit(dataset, name, position):
    flip(dataset / name, position)
    (problem,) = verify(dataset)
    assert name in problem
    assert "another checksum" in problem


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda d: (d / "train/00000.bin").write_bytes((d / "train/00000.bin").read_bytes()[:-2]), "it is truncated"),
        (lambda d: (d / "train/00000.idx").write_bytes((d / "train/00000.idx").read_bytes() + b"x"), "it is damaged"),
        (lambda d: (d / "train/00000.idx").unlink(), "00000.idx is missing"),
        (lambda d: shutil.rmtree(d / "validation"), "validation/00000.bin is missing"),
        (lambda d: (d / "train/00007.bin").write_bytes(b"x"), "00007.bin is not in the manifest"),
        (lambda d: flip(d / "tokenizer/tokenizer.model", -1), "tokenizer"),
        (lambda d: shutil.rmtree(d / "tokenizer"), "tokenizer"),
    ],
)
def test_other_damage(dataset, damage, said):
    damage(dataset)
    assert any(said in problem for problem in verify(dataset))


def test_changed_and_missing_inputs(dataset):
    source = dataset.parent / "a.jsonl"
    flip(source, 10)
    assert verify(dataset) == []
    assert "is not the file that was tokenized" in verify(dataset, inputs=True)[0]
    source.unlink()
    assert "is missing" in verify(dataset, inputs=True)[0]


@pytest.mark.parametrize(
    ("tokens", "said"), [([5, 60_000, 2], "holds the id 60000, outside"), ([5, 6, 7], "does not end with the end token 2")]
)
def test_contents_are_looked_at_behind_right_checksums(dataset, tokens, said):
    manifest = Manifest.load(dataset)
    shard = manifest.splits["train"].shards[0]
    with IndexedWriter(dataset / shard.path, shard.dtype) as writer:
        writer.add(np.array(tokens), [3])
    shard.documents, shard.tokens, shard.xxh3_bin, shard.xxh3_idx = 1, 3, writer.xxh3_bin, writer.xxh3_idx
    manifest.save(dataset)
    (problem,) = verify(dataset)
    assert said in problem
