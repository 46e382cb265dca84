"""Every token has its place once, and rows are what a slow and simple packing gives."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mamba_pretrain.data.packed_dataset import TokenStream
from mamba_pretrain.data.packing import BestFitPacking, ConcatPacking, ragged_ranges
from mamba_pretrain.data.storage import DatasetFolder

corpora = st.tuples(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.lists(st.integers(1, 12), max_size=4), st.integers(2, 24))


def open_stream(folder) -> TokenStream:
    return TokenStream(DatasetFolder(str(folder)), "train")


def test_ragged_ranges():
    rows, values = ragged_ranges(np.array([5, 0, 9]), np.array([2, 0, 3]))
    assert rows.tolist() == [0, 0, 2, 2, 2]
    assert values.tolist() == [5, 6, 9, 10, 11]


@settings(max_examples=80, deadline=None)
@given(corpus=corpora, keep_tail=st.booleans())
def test_concat_cuts_the_stream(make_dataset, corpus, keep_tail):
    lengths, shards, length = corpus
    stream = open_stream(make_dataset(lengths, shards=shards))
    packing = ConcatPacking(stream, length, keep_tail)
    targets = stream.n_tokens - 1
    assert packing.n_samples == (-(-targets // length) if keep_tail else targets // length)
    layout = packing.layout(np.arange(packing.n_samples))
    assert layout.first.tolist() == [i * length for i in range(packing.n_samples)]
    assert (layout.count - 1).sum() == (targets if keep_tail else packing.n_samples * length)
    assert packing.n_padding == packing.n_samples * length - (layout.count - 1).sum()
    starts = set(np.cumsum([0, *lengths])[:-1].tolist())
    for row in range(packing.n_samples):
        inside = {int(column) for column in layout.start_column[layout.start_row == row]}
        assert inside == {column for column in range(1, layout.count[row]) if row * length + column in starts}


@settings(max_examples=100, deadline=None)
@given(corpus=corpora)
def test_best_fit_places_every_token_once_and_keeps_documents_whole(make_dataset, corpus):
    lengths, shards, length = corpus
    stream = open_stream(make_dataset(lengths, shards=shards))
    packing = BestFitPacking(stream, length)
    layout = packing.layout(np.arange(packing.n_samples))
    inputs = np.minimum(layout.count, length - layout.column)
    times = np.zeros(stream.n_tokens, dtype=int)
    for first, count in zip(layout.first, inputs, strict=True):
        times[first : first + count] += 1
    assert (times == 1).all()
    starts = np.cumsum([0, *lengths])
    whole = {(int(first), int(count)) for first, count in zip(layout.first, layout.count, strict=True)}
    for start, size in zip(starts[:-1].tolist(), lengths, strict=True):
        if size <= length:
            assert (start, size) in whole
    assert packing.n_padding == packing.n_samples * length - stream.n_tokens
    fill = np.bincount(layout.row, weights=layout.count, minlength=packing.n_samples)
    assert np.array_equal(fill, layout.fill)
    assert (layout.fill <= length + 1).all()


@settings(max_examples=40, deadline=None)
@given(corpus=corpora, data=st.data())
@pytest.mark.parametrize("packing_class", [ConcatPacking, BestFitPacking])
def test_any_samples_in_any_order_give_the_same_rows(make_dataset, packing_class, corpus, data):
    lengths, shards, length = corpus
    packing = packing_class(open_stream(make_dataset(lengths, shards=shards)), length)
    if packing.n_samples == 0:
        return
    chosen = data.draw(st.lists(st.integers(0, packing.n_samples - 1), min_size=1, max_size=12))
    together = packing.layout(np.array(chosen))
    for row, sample in enumerate(chosen):
        alone = packing.layout(np.array([sample]))
        mine = together.row == row
        for name in ("column", "first", "count"):
            assert getattr(together, name)[mine].tolist() == getattr(alone, name).tolist()
        assert together.start_column[together.start_row == row].tolist() == alone.start_column.tolist()
        assert together.fill[row] == alone.fill[0]


def test_the_last_token_of_a_full_piece_has_a_target_where_the_document_goes_on(make_dataset):
    packing = BestFitPacking(open_stream(make_dataset([25, 20])), 10)
    layout = packing.layout(np.arange(packing.n_samples))
    assert packing.n_full == 4
    assert sorted(zip(layout.first.tolist(), layout.count.tolist(), strict=True)) == [(0, 11), (10, 11), (20, 5), (25, 11), (35, 10)]
    assert packing.n_padding == 5


def test_best_fit_fills_well_where_concat_cuts():
    """On lengths like those of web documents (the plan alone is looked at, no files)."""
    from data_tools.packing import best_fit_plan

    lengths = np.clip(np.random.default_rng(0).lognormal(6.2, 1.0, 100_000).astype(int), 1, 2047)
    plan = best_fit_plan(np.bincount(lengths, minlength=2049), 2048)
    assert lengths.sum() / (plan.n_bins * 2048) > 0.999
