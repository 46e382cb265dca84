"""The same samples for any world size, micro-batch and number of threads, before and after any resume."""

from __future__ import annotations

import json
import os
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.errors import UserError
from mamba_pretrain.data.batch import Batch
from mamba_pretrain.data.config import DataConfig
from mamba_pretrain.data.loader import TrainingData, bytes_per_token, validation_batches, validation_names
from mamba_pretrain.data.storage import LocalStorage

LENGTH = 16


@pytest.fixture(scope="module")
def sources(make_dataset):
    """Three datasets with a common tokenizer, of 20 to 60 samples."""
    return [make_dataset([7, 19, 3, 40, 11] * n, shards=[2, 3], name=f"s{n}", seed=n, validation=[30, 9]) for n in (4, 7, 12)]


def configure(sources, weights=(1, 2, 3), **settings) -> DataConfig:
    entries = [{"path": str(path), "weight": weight} for path, weight in zip(sources, weights, strict=True) if weight]
    return DataConfig(sources=entries, sequence_length=LENGTH, **settings)


def taken(config, first, size, steps, world=1, micro=1, state=None) -> tuple[list[Batch], dict]:
    """The global batches of some steps, put together from all ranks, and the state after them."""
    ranks = [TrainingData(config, 5, rank, world, micro) for rank in range(world)]
    whole = []
    for data in ranks:
        if state is not None:
            data.load(json.loads(json.dumps(state)), first)
    for step in range(steps):
        parts = [batch for data in ranks for batch in data.take(first + step * size, size)]
        joined = Batch.concatenate(parts)
        whole.append(joined.rows(torch.argsort(joined.sample_ids)))
    state = ranks[0].state()
    for data in ranks:
        data.close()
    return whole, state


def assert_equal(left: list[Batch], right: list[Batch]) -> None:
    for a, b in zip(left, right, strict=True):
        for name in ("tokens", "labels", "seq_idx", "positions", "sample_ids"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name
        assert a.n_valid == b.n_valid


@settings(max_examples=25, deadline=None)
@given(
    divided=st.sampled_from(
        [(world, micro) for world in (1, 2, 3, 4, 6, 12) for micro in (1, 2, 3, 4, 6, 12) if 12 % (world * micro) == 0]
    ),
    packing=st.sampled_from(["concat", "best-fit"]),
    workers=st.integers(1, 3),
    read_ahead=st.sampled_from([1, 2, 5, 64]),
)
def test_global_batches_do_not_depend_on_how_they_are_divided(sources, divided, packing, workers, read_ahead):
    expected, _ = taken(configure(sources, packing=packing), 0, 12, 9)
    config = configure(sources, packing=packing, workers=workers, read_ahead=read_ahead)
    assert_equal(taken(config, 0, 12, 9, *divided)[0], expected)


def test_rank_r_takes_the_rth_block_of_each_micro_step(sources):
    data = TrainingData(configure(sources), 5, rank=1, world_size=2, micro_batch_size=3)
    assert [batch.sample_ids.tolist() for batch in data.take(24, 12)] == [[27, 28, 29], [33, 34, 35]]
    data.close()


@settings(max_examples=15, deadline=None)
@given(
    stops=st.lists(st.integers(1, 6), min_size=2, max_size=3),
    worlds=st.lists(st.sampled_from([1, 2, 3]), min_size=3, max_size=3),
    packing=st.sampled_from(["concat", "best-fit"]),
)
def test_resuming_twice_across_epochs_and_world_sizes_gives_the_same_samples(sources, stops, worlds, packing):
    config = configure(sources, packing=packing)
    expected, _ = taken(config, 0, 24, sum(stops))  # 24 samples a step: a few steps are an epoch of the smallest source
    found, state, first = [], None, 0
    for steps, world in zip(stops, worlds, strict=False):
        batches, state = taken(config, first, 24, steps, world, micro=4, state=state)
        found += batches
        first += 24 * steps
    assert_equal(found, expected)


def test_every_epoch_of_every_source_gives_each_sample_once(sources):
    config = configure(sources[:1], [1])
    data = TrainingData(config, 5)
    n = data.total_samples["s4"]
    epochs = [[batch.tokens[0].tolist() for i in range(n) for batch in data.take(e * n + i, 1)] for e in range(2)]
    data.close()
    assert len({tuple(row) for row in epochs[0]}) == n
    assert sorted(epochs[0]) == sorted(epochs[1])
    assert epochs[0] != epochs[1]


def first_tokens(batches: list[Batch]) -> list[tuple[int, ...]]:
    return [tuple(row) for batch in batches for row in batch.tokens.tolist()]


def test_a_changed_blend_repeats_and_loses_no_sample(sources):
    """Weights change, a source leaves and comes back: within each source's epoch every sample is seen once."""
    first, state = taken(configure(sources, (1, 1, 1)), 0, 6, 3)
    second, state = taken(configure(sources, (1, 0, 5)), 18, 6, 2, world=2, state=state)
    third, _ = taken(configure(sources, (1, 1, 1)), 30, 6, 3, state=state)
    seen = first_tokens([*first, *second, *third])
    assert len(set(seen)) == len(seen) == 48
    assert state["blend"][-1]["start"] == 18


def test_load_says_whether_the_blend_changed(sources):
    before = TrainingData(configure(sources, (1, 1, 1)), 5)
    same, other = TrainingData(configure(sources, (2, 2, 2)), 5), TrainingData(configure(sources, (2, 1, 1)), 5)
    assert not same.load(before.state(), 10)
    assert other.load(before.state(), 10)
    for data in (before, same, other):
        data.close()


def test_the_state_is_integers_and_names(sources):
    data = TrainingData(configure(sources), 5)

    def leaves(value):
        if isinstance(value, dict):
            return [leaf for item in value.values() for leaf in leaves(item)]
        return [leaf for item in value for leaf in leaves(item)] if isinstance(value, list) else [value]

    assert {type(leaf) for leaf in leaves(data.state())} <= {int, str}
    data.close()


def test_batches_that_grow_use_what_was_read_ahead(sources, monkeypatch):
    """A batch ramp: the next range is larger than the one before, and no sample is read twice."""
    data = TrainingData(configure(sources), 5, micro_batch_size=2)
    read: list[int] = []
    original = data._read
    monkeypatch.setattr(data, "_read", lambda expected, starts: read.extend(starts) or original(expected, starts))
    position = 0
    for size in (2, 4, 4, 8):
        data.take(position, size)
        position += size
    data.close()
    assert len(read) == len(set(read))
    assert set(range(0, 18, 2)) <= set(read)


def test_each_group_is_announced_before_the_one_before_it_is_read(sources, monkeypatch):
    done = []
    for name in ("expect", "read"):
        original = getattr(LocalStorage, name)
        monkeypatch.setattr(LocalStorage, name, lambda *a, name=name, original=original: done.append((name, a[1].offset)) or original(*a))
    data = TrainingData(configure(sources[:1], [1], read_ahead=4), 5, micro_batch_size=2)
    data.take(0, 12)
    data.close()
    names, offsets = [name for name, _ in done], [offset for _, offset in done]
    assert names[:6] == ["expect", "expect", "read", "expect", "read", "read"]
    assert [offsets[0], offsets[1], offsets[3]] == [offsets[2], offsets[4], offsets[5]]


def test_a_jump_forgets_what_was_read_ahead(sources):
    data = TrainingData(configure(sources), 5, micro_batch_size=2)
    data.take(0, 4)
    assert [batch.sample_ids.tolist() for batch in data.take(100, 4)] == [[100, 101], [102, 103]]
    assert [batch.sample_ids.tolist() for batch in data.take(0, 4)] == [[0, 1], [2, 3]]
    data.close()


def test_the_next_range_is_read_while_this_one_is_used(sources):
    data = TrainingData(configure(sources), 5, micro_batch_size=4)
    data.take(0, 8)
    deadline = time.monotonic() + 10
    while not all(group.done() for group, _ in data._pending.values()) and time.monotonic() < deadline:
        time.sleep(0.01)
    data.take(8, 8)
    assert data.last_wait_seconds < 0.05
    assert len(data._pending) == 2
    data.close()


def test_errors_of_the_thread_come_out_of_take(make_dataset):
    folder = make_dataset([400])
    data = TrainingData(DataConfig(path=str(folder), sequence_length=LENGTH, shuffle=False), 5)
    os.truncate(folder / "train" / "00000.bin", 20)
    with pytest.raises(UserError, match=r"00000\.bin ends before"):
        data.take(0, 4)
    data.close()


def test_close_stops_the_threads_and_may_be_called_twice(sources):
    before = threading.active_count()
    data = TrainingData(configure(sources, workers=3), 5)
    data.take(0, 12)
    data.close()
    data.close()
    assert threading.active_count() == before


def test_what_it_says_of_itself(sources):
    config = configure(sources)
    data, other_seed = TrainingData(config, 5), TrainingData(config, 6)
    assert data.vocab_size == 1000
    assert (data.tokenizer_dir / "tokenizer.json").is_file()
    assert data.sequence_length == LENGTH
    assert data.total_samples == {"s4": 19, "s7": 34, "s12": 59}
    assert bytes_per_token(config, "s4") == 3.0
    assert data.fingerprint == TrainingData(configure(sources, (5, 5, 5)), 5).fingerprint != other_seed.fingerprint
    data.take(0, 12)
    assert data.samples_drawn() == {"s4": 2, "s7": 4, "s12": 6}
    data.close()


def test_a_batch_that_does_not_divide(sources):
    data = TrainingData(configure(sources), 5, world_size=2, micro_batch_size=3)
    with pytest.raises(UserError, match="global batch of 8 sequences is not divisible by world size x micro-batch = 6"):
        data.take(0, 8)
    data.close()


@pytest.mark.parametrize("packing", ["concat", "best-fit"])
def test_a_sequence_longer_than_the_data(make_dataset, packing):
    config = DataConfig(path=str(make_dataset([10, 6])), sequence_length=16, packing=packing)
    with pytest.raises(UserError, match=r"data\.sequence_length 16 is longer than .* 16 tokens; set data\.sequence_length to at most 15"):
        TrainingData(config, 5)


def test_tokenizers_must_agree(make_dataset):
    sources = [{"path": str(make_dataset([50], name=name, seed=i, tokenizer_hash=name))} for i, name in enumerate("ab")]
    with pytest.raises(UserError, match="another tokenizer"):
        TrainingData(DataConfig(sources=sources, sequence_length=8), 5)


def test_the_same_dataset_twice(make_dataset):
    path = str(make_dataset([50]))
    with pytest.raises(UserError, match="same dataset twice"):
        TrainingData(DataConfig(sources=[{"path": path}, {"path": path, "name": "again"}], sequence_length=8), 5)


@pytest.mark.parametrize(
    ("change", "words"),
    [({"seed": 6}, "seed=5"), ({"sequence_length": 8}, r"data\.sequence_length=16"), ({"packing": "best-fit"}, r"data\.packing=concat")],
)
def test_another_order_is_refused_on_resume(sources, change, words):
    saved = TrainingData(configure(sources), 5)
    config = configure(sources).model_copy(update={key: value for key, value in change.items() if key != "seed"})
    data = TrainingData(config, change.get("seed", 5))
    with pytest.raises(UserError, match=f"set {words}"):
        data.load(saved.state(), 10)
    saved.close()
    data.close()


def test_going_back_to_a_source_that_left(sources):
    _, state = taken(configure(sources, (1, 1, 1)), 0, 6, 3)
    data = TrainingData(configure(sources, (1, 0, 1)), 5)
    data.load(state, 18)
    with pytest.raises(UserError, match=r"dataset that data\.sources no longer names"):
        data.take(0, 6)
    data.close()


# -- validation


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("micro", [1, 2, 4])
@pytest.mark.parametrize("max_samples", [None, 3])
def test_validation_gives_every_sample_once_and_every_rank_as_many_batches(make_dataset, read_stream, world, micro, max_samples):
    folder = make_dataset([50], validation=[30, 9, 50, 13])
    config = DataConfig(path=str(folder), sequence_length=LENGTH)
    by_rank = [list(validation_batches(config, "data", rank, world, micro, max_samples)) for rank in range(world)]
    assert len({len(batches) for batches in by_rank}) == 1
    assert all(batch.tokens.shape == (micro, LENGTH) for batches in by_rank for batch in batches)
    ids = sorted(i for batches in by_rank for batch in batches for i in batch.sample_ids.tolist() if i >= 0)
    assert ids == (list(range(7)) if max_samples is None else [0, 2, 4])
    if max_samples is None:
        _, owner = read_stream(folder, "validation")
        assert sum(batch.n_valid for batches in by_rank for batch in batches) == np.count_nonzero(owner[1:] == owner[:-1])


def test_a_validation_split_shorter_than_a_sequence(make_dataset):
    config = DataConfig(path=str(make_dataset([50], validation=[5])), sequence_length=LENGTH)
    (batch,) = validation_batches(config, "data")
    assert batch.n_valid == 4


def test_validation_names(make_dataset):
    with_split, without = make_dataset([50], validation=[20], name="x"), make_dataset([50], name="y")
    extra = make_dataset([50], validation=[20], name="z")
    config = DataConfig(
        sources=[{"path": str(with_split)}, {"path": str(without)}], validation_sources=[{"path": str(extra), "name": "books"}]
    )
    assert validation_names(config) == ["x", "books"]
    with pytest.raises(UserError, match="no data source is called 'film'; there are: x, y, books"):
        next(validation_batches(config, "film"))
