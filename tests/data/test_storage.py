"""Datasets behind URLs read like local ones; huge ones open at once."""

from __future__ import annotations

import os
import resource
import time
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch

from data_tools.errors import UserError
from data_tools.indexed import index_bytes
from data_tools.manifest import Manifest, Shard, Split, TokenizerInfo
from mamba_pretrain.data.config import DataConfig
from mamba_pretrain.data.loader import TrainingData, validation_batches, validation_names


@pytest.fixture
def bucket():
    """An empty object store in memory."""
    filesystem = fsspec.filesystem("memory")
    yield filesystem
    filesystem.rm("/", recursive=True)


def upload(folder: Path, filesystem, name: str) -> str:
    filesystem.put(str(folder), f"/{name}", recursive=True)
    return f"memory://{name}"


@pytest.mark.parametrize("packing", ["concat", "best-fit"])
def test_a_remote_dataset_gives_the_batches_of_the_local_one(make_dataset, bucket, tmp_path, packing):
    folder = make_dataset([7, 19, 3, 40, 11] * 6, shards=[2, 9], validation=[20, 30])
    url = upload(folder, bucket, "corpora/data")
    local, remote = (
        TrainingData(DataConfig(path=path, sequence_length=16, packing=packing, cache_dir=str(tmp_path)), 5, micro_batch_size=3)
        for path in (str(folder), url)
    )
    assert remote.fingerprint == local.fingerprint
    for step in range(5):
        for a, b in zip(local.take(12 * step, 12), remote.take(12 * step, 12), strict=True):
            assert torch.equal(a.tokens, b.tokens)
            assert torch.equal(a.labels, b.labels)
            assert torch.equal(a.seq_idx, b.seq_idx)
    assert (remote.tokenizer_dir / "tokenizer.json").read_text() == "{}"
    assert validation_names(remote.config) == ["data"]
    assert [b.n_valid for b in validation_batches(remote.config, "data")] == [b.n_valid for b in validation_batches(local.config, "data")]
    assert not list(tmp_path.rglob("*.bin"))
    local.close()
    remote.close()


def test_small_files_are_copied_once(make_dataset, bucket, tmp_path, monkeypatch):
    config = DataConfig(path=upload(make_dataset([50, 60]), bucket, "data"), sequence_length=16, cache_dir=str(tmp_path))
    TrainingData(config, 5).close()
    fetched = []
    original = type(bucket).get_file
    monkeypatch.setattr(
        type(bucket), "get_file", lambda self, remote, *rest, **kw: fetched.append(remote) or original(self, remote, *rest, **kw)
    )
    TrainingData(config, 5).close()
    assert fetched == ["/data/manifest.json"]


def test_a_dataset_made_anew_behind_the_same_url(make_dataset, bucket, tmp_path):
    first, second = make_dataset([50, 60], seed=1), make_dataset([50, 60], seed=2)
    tokens = []
    for folder in (first, second):
        url = upload(folder, bucket, "data")
        data = TrainingData(DataConfig(path=url, sequence_length=16, cache_dir=str(tmp_path)), 5)
        tokens.append(data.take(0, 1)[0].tokens)
        data.close()
        bucket.rm("/data", recursive=True)
    assert not torch.equal(*tokens)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda fs: fs.rm("/data/manifest.json"), "manifest.json does not exist"),
        (lambda fs: fs.rm("/data/train/00000.bin"), "00000.bin does not exist"),
        (lambda fs: fs.rm("/data/train/00000.idx"), "00000.idx does not exist"),
        (lambda fs: fs.pipe_file("/data/train/00000.bin", b"1234"), "truncated"),
    ],
)
def test_an_incomplete_upload_is_named(make_dataset, bucket, tmp_path, damage, words):
    url = upload(make_dataset([50, 60]), bucket, "data")
    damage(bucket)
    with pytest.raises(UserError, match=words):
        TrainingData(DataConfig(path=url, sequence_length=16, cache_dir=str(tmp_path)), 5)


def test_an_object_that_ends_early(make_dataset, bucket, tmp_path):
    url = upload(make_dataset([500]), bucket, "data")
    data = TrainingData(DataConfig(path=url, sequence_length=16, cache_dir=str(tmp_path)), 5)
    bucket.pipe_file("/data/train/00000.bin", b"12")
    with pytest.raises(UserError, match="upload it again"):
        data.take(0, 8)
    data.close()


def test_more_shards_than_files_may_be_open(make_dataset, read_stream):
    """The limit of open files is raised as far as the system allows; past that, a sentence says what to do."""
    folder = make_dataset([9] * 120, shards=[1] * 119)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    config = DataConfig(path=str(folder), sequence_length=16, shuffle=False)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/dev/fd")) + 50, hard))
        data = TrainingData(config, 5)
        batches = data.take(0, data.total_samples["data"])
        data.close()
        expected = read_stream(folder)[0][: 16 * len(batches)].reshape(-1, 16)
        assert np.array_equal(np.concatenate([batch.tokens.numpy() for batch in batches]), expected)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_an_unknown_protocol():
    with pytest.raises(UserError, match="nowhere://x cannot be opened"):
        TrainingData(DataConfig(path="nowhere://x"), 5)


def sparse_dataset(folder: Path, shards: int, documents: int, length: int) -> Path:
    """A dataset whose token files are holes: any size, no disk."""
    split = Split()
    (folder / "train").mkdir(parents=True)
    index = index_bytes(np.full(documents, length), np.dtype(np.uint16))
    for number in range(shards):
        path = folder / "train" / f"{number:05d}"
        path.with_suffix(".idx").write_bytes(index)
        with path.with_suffix(".bin").open("wb") as file:
            file.truncate(2 * documents * length)
        split.shards.append(Shard(f"train/{number:05d}", documents, documents * length, "uint16", "-", "-"))
    Manifest(tokenizer=TokenizerInfo("test", "t", 1000, 0, None), splits={"train": split}).save(folder)
    return folder


def test_a_billion_samples_open_in_under_a_second_without_memory(tmp_path):
    folder = sparse_dataset(tmp_path / "huge", shards=64, documents=16_001, length=2_000_000)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    data = TrainingData(DataConfig(path=str(folder), sequence_length=2048), 5, micro_batch_size=8)
    opened = time.perf_counter() - began
    assert data.total_samples["huge"] > 10**9
    batches = data.take(10**12, 32)
    data.close()
    assert opened < 1.0
    assert [batch.tokens.shape for batch in batches] == [(8, 2048)] * 4
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 50_000  # KiB
