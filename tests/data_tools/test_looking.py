"""stats, inspect and the figures behind them."""

from __future__ import annotations

import numpy as np
import pytest

from data_tools.errors import UserError
from data_tools.indexed import IndexedDataset
from data_tools.looking import Fill, document, histogram, sample, stats
from data_tools.manifest import Manifest
from data_tools.pipeline import tokenize
from data_tools.sources import find_files, plan_tasks
from data_tools.worker import Options


@pytest.fixture
def dataset(tmp_path, texts, tokenizers, write_jsonl, small_tasks):
    source = write_jsonl(tmp_path / "a.jsonl", [*texts, texts[5], texts[6]])
    options = Options(str(tokenizers["sentencepiece"]), validation_fraction=0.1)
    tokenize(plan_tasks(find_files([str(source)], [], [])), options, tmp_path / "data", 1)
    assert len(Manifest.load(tmp_path / "data").splits["train"].shards) > 2
    return tmp_path / "data"


def all_documents(folder) -> list[list[int]]:
    shards = Manifest.load(folder).splits["train"].shards
    return [data[i].tolist() for shard in shards for data in [IndexedDataset(folder / shard.path)] for i in range(len(data))]


def test_stats_count_what_is_there(dataset):
    documents = all_documents(dataset)
    tokens = np.concatenate(documents)
    found = stats(dataset, "train")
    assert (found.documents, found.tokens) == (len(documents), len(tokens))
    assert found.lengths.tolist() == [len(d) for d in documents]
    counts = np.bincount(tokens)
    shares = counts[counts > 0] / len(tokens)
    assert found.unigram_entropy == pytest.approx(-(shares * np.log(shares)).sum())
    assert found.top_tokens[0][1] == pytest.approx(counts.max() / len(tokens))
    assert found.duplicates == len(documents) - len({tuple(d) for d in documents})
    text_bytes = Manifest.load(dataset).splits["train"].text_bytes
    assert found.bytes_per_token == pytest.approx(text_bytes / len(tokens))


def test_fill_is_what_packing_gives():
    """Two sequences of 10: concat cuts the second document (6 + 6), best fit packs 6 + 4 and 6 + 3 + 1."""
    fill = Fill.of(np.array([6, 6, 4, 3, 1]), 10)
    assert fill.cut_by_concat == pytest.approx(1 / 5)
    assert (fill.best_fit_sequences, fill.best_fit_fill) == (2, 1.0)
    long = Fill.of(np.array([25, 5]), 10)
    assert (long.best_fit_sequences, long.cut_by_concat) == (3, 0.0)


def test_histogram_counts_every_document():
    lines = histogram(np.array([1, 2, 3, 900, 1000, 1023]))
    assert [line.split()[-2] for line in lines] == ["1", "2", "3"]
    assert lines[-1].split()[0] == "512"


def test_documents_and_samples_are_those_of_the_files(dataset):
    documents = all_documents(dataset)
    assert document(dataset, "train", 0).tolist() == documents[0]
    assert document(dataset, "train", len(documents) - 1).tolist() == documents[-1]
    tokens, owners = np.concatenate(documents), np.repeat(np.arange(len(documents)), [len(d) for d in documents])
    for number in (0, 1, len(tokens) // 1000):
        found, of = sample(dataset, "train", number, 1000)
        assert found.tolist() == tokens[number * 1000 : number * 1000 + 1000].tolist()
        assert of.tolist() == owners[number * 1000 : number * 1000 + 1000].tolist()
    for wrong in (
        lambda: document(dataset, "train", len(documents)),
        lambda: sample(dataset, "train", 10**6, 1000),
        lambda: stats(dataset, "test"),
    ):
        with pytest.raises(UserError):
            wrong()


def test_commands_show_it(dataset, mamba_data, tmp_path):
    result = mamba_data("stats", dataset, "--png", tmp_path / "lengths.png")
    assert result.code == 0
    assert "exact duplicates" in result.out
    assert "best-fit cuts none" in result.out
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")
    result = mamba_data("inspect", dataset, "0", "--limit", "5", "--ids")
    assert " ".join(map(str, all_documents(dataset)[0][:5])) in result.out
    result = mamba_data("inspect", dataset, "--sample", "1", "--sequence-length", "600", "--limit", "600")
    assert "--- document " in result.out
    assert "<end>" in result.out
    assert mamba_data("stats", dataset, "--png", tmp_path / "no" / "folder.png").code == 2
