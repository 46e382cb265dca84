"""Batches equal what is built token by token; padding and boundaries take no loss."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mamba_pretrain.data.batch import IGNORE, Batch, empty_batch
from mamba_pretrain.data.config import DataConfig
from mamba_pretrain.data.sampling import Source

corpora = st.tuples(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.lists(st.integers(1, 12), max_size=4), st.integers(2, 24))


def whole_epoch(folder, length: int, **settings) -> Batch | None:
    """All samples of a source as one batch; None if there are not enough tokens."""
    config = DataConfig(path=str(folder), sequence_length=length, **settings)
    source = Source.for_training(config, config.sources[0])
    samples = np.arange(source.n_samples)
    batch = source.batch(samples, samples)
    source.close()
    return batch


def check_boundaries(batch: Batch) -> None:
    """``positions`` restart exactly where ``seq_idx`` changes; ``seq_idx`` counts 0, 1, 2, ... in each row."""
    for seq_idx, positions in zip(batch.seq_idx.tolist(), batch.positions.tolist(), strict=True):
        assert (seq_idx[0], positions[0]) == (0, 0)
        for i in range(1, len(seq_idx)):
            begins = seq_idx[i] != seq_idx[i - 1]
            assert seq_idx[i] == seq_idx[i - 1] + begins
            assert positions[i] == (0 if begins else positions[i - 1] + 1)


@settings(max_examples=60, deadline=None)
@given(corpus=corpora, masked=st.booleans())
def test_concat(make_dataset, read_stream, corpus, masked):
    lengths, shards, length = corpus
    if sum(lengths) <= length:
        return
    folder = make_dataset(lengths, shards=shards)
    tokens, owner = read_stream(folder)
    batch = whole_epoch(folder, length, mask_cross_document=masked)
    for row in range(len(batch.tokens)):
        for i in range(length):
            t = row * length + i
            assert batch.tokens[row, i] == tokens[t]
            crosses = owner[t] != owner[t + 1]
            assert batch.labels[row, i] == (IGNORE if crosses and masked else tokens[t + 1])
            if i:
                assert (batch.seq_idx[row, i] != batch.seq_idx[row, i - 1]) == (owner[t] != owner[t - 1])
    check_boundaries(batch)
    assert batch.n_valid == (batch.labels != IGNORE).sum()


@settings(max_examples=60, deadline=None)
@given(corpus=corpora)
def test_best_fit_gives_every_target_once(make_dataset, read_stream, corpus):
    """Every token but the first of each document is a target exactly once, and follows its own predecessor."""
    lengths, shards, length = corpus
    if sum(lengths) <= length:
        return
    folder = make_dataset(lengths, shards=shards)
    tokens, owner = read_stream(folder)
    batch = whole_epoch(folder, length, packing="best-fit", mask_cross_document=False)
    check_boundaries(batch)
    valid = batch.labels != IGNORE
    found = sorted(zip(batch.tokens[valid].tolist(), batch.labels[valid].tolist(), strict=True))
    inner = owner[1:] == owner[:-1]
    assert found == sorted(zip(tokens[:-1][inner].tolist(), tokens[1:][inner].tolist(), strict=True))
    assert batch.n_valid == len(found)


def test_padding_is_a_document_without_targets(make_dataset):
    batch = whole_epoch(make_dataset([6, 7]), 10, packing="best-fit")
    assert batch.tokens.shape == (2, 10)
    by_fill = sorted((row.tolist() for row in batch.seq_idx), key=sum)
    assert by_fill == [[0] * 7 + [1] * 3, [0] * 6 + [1] * 4]
    assert batch.n_valid == 11


def test_the_types_are_those_of_the_contract(make_dataset):
    batch = whole_epoch(make_dataset([40]), 8)
    assert [batch.tokens.dtype, batch.labels.dtype, batch.positions.dtype, batch.sample_ids.dtype] == [torch.int64] * 4
    assert batch.seq_idx.dtype == torch.int32
    assert isinstance(batch.n_valid, int)


@pytest.mark.parametrize("rows", [slice(1, 3), torch.tensor([3, 0])])
def test_rows_and_concatenation(make_dataset, rows):
    batch = whole_epoch(make_dataset([9, 9, 9, 9, 5]), 8)
    part = batch.rows(rows)
    assert torch.equal(part.tokens, batch.tokens[rows])
    assert part.n_valid == (batch.labels[rows] != IGNORE).sum()
    joined = Batch.concatenate([batch.rows(slice(0, 1)), batch.rows(slice(1, None))])
    assert torch.equal(joined.labels, batch.labels)
    assert joined.n_valid == batch.n_valid


def test_an_empty_batch_has_no_targets():
    batch = empty_batch(2, 5)
    assert batch.n_valid == 0
    assert (batch.labels == IGNORE).all()
    assert batch.sample_ids.tolist() == [-1, -1]
    check_boundaries(batch)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="page-locked memory needs a CUDA device")
def test_pinned():
    batch = empty_batch(2, 5).pinned()
    assert batch.tokens.is_pinned()
    assert torch.equal(batch.labels, empty_batch(2, 5).labels)
