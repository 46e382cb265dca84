"""Looking at a dataset: count it, decode its documents and packed samples."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_tools.dedup import HASH, document_hash
from data_tools.errors import UserError
from data_tools.indexed import IndexedDataset
from data_tools.manifest import Manifest, Split
from data_tools.packing import best_fit_plan
from data_tools.tokenizers import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class Fill:
    """How documents (lengths in tokens) fit into sequences of ``sequence_length``."""

    sequence_length: int
    cut_by_concat: float  # share of the documents that would fit whole but are cut by concat-and-chunk
    best_fit_fill: float  # share of places that hold tokens under best-fit packing, where no such document is cut
    best_fit_sequences: int

    @classmethod
    def of(cls, lengths: np.ndarray, sequence_length: int) -> Fill:
        """Measures both packings."""
        starts = np.cumsum(lengths, dtype=np.int64) - lengths
        fits = lengths <= sequence_length
        crosses = starts // sequence_length != (starts + lengths - 1) // sequence_length
        plan = best_fit_plan(np.bincount(lengths % sequence_length, minlength=sequence_length + 1), sequence_length)
        sequences = int((lengths // sequence_length).sum()) + plan.n_bins
        fill = int(lengths.sum(dtype=np.int64)) / max(1, sequences * sequence_length)
        return cls(sequence_length, float((fits & crosses).sum() / max(1, fits.sum())), fill, sequences)


@dataclass(frozen=True)
class Stats:
    """Figures of one split. ``lengths`` are the documents' in tokens; ``unigram_entropy`` is in nats per token."""

    documents: int
    tokens: int
    bytes_per_token: float | None
    lengths: np.ndarray
    top_tokens: list[tuple[str, float]]
    unigram_entropy: float
    duplicates: int


def stats(folder: Path, split: str, top: int = 12) -> Stats:
    """Counts a split; reads every token once."""
    manifest, described = open_split(folder, split)
    tokenizer = load_tokenizer(folder / "tokenizer")
    counts = np.zeros(manifest.tokenizer.vocab_size, dtype=np.int64)
    lengths: list[np.ndarray] = []
    hashes: list[tuple[int, int]] = []
    for shard in described.shards:
        data = IndexedDataset(folder / shard.path)
        lengths.append(np.array(data.lengths))
        for tokens, each in data.batches():
            counts += np.bincount(tokens, minlength=len(counts))
            ends = np.cumsum(each)
            hashes += [
                document_hash(tokens[end - length : end].tobytes()) for end, length in zip(ends.tolist(), each.tolist(), strict=True)
            ]
        data.close()
    shares = counts[counts > 0] / counts.sum()
    common = np.argsort(-counts, kind="stable")[:top]
    return Stats(
        documents=described.documents,
        tokens=described.tokens,
        bytes_per_token=described.text_bytes / described.tokens if described.text_bytes else None,
        lengths=np.concatenate(lengths),
        top_tokens=[(shown(tokenizer, int(token)), counts[token] / described.tokens) for token in common],
        unigram_entropy=float(-(shares * np.log(shares)).sum()),
        duplicates=len(hashes) - len(np.unique(np.array(hashes, dtype=HASH))),
    )


def token_counts(folder: Path, split: str) -> np.ndarray:
    """(vocab,) int64: how often each id occurs in a split."""
    manifest, described = open_split(folder, split)
    counts = np.zeros(manifest.tokenizer.vocab_size, dtype=np.int64)
    for shard in described.shards:
        data = IndexedDataset(folder / shard.path)
        for tokens, _ in data.batches():
            counts += np.bincount(tokens, minlength=len(counts))
        data.close()
    return counts


def open_split(folder: Path, split: str) -> tuple[Manifest, Split]:
    """A dataset's manifest and one of its splits. Raises UserError that names those it has."""
    manifest = Manifest.load(folder)
    if split not in manifest.splits:
        raise UserError(f"dataset {folder} has no split {split!r}; it has {', '.join(manifest.splits)}")
    return manifest, manifest.splits[split]


def shown(tokenizer: Tokenizer, token: int) -> str:
    """A token as visible text."""
    if token == tokenizer.eos_id:
        return "<end>"
    return repr(tokenizer.decode([token]))[1:-1] or f"<{token}>"


def histogram(lengths: np.ndarray, width: int = 40) -> list[str]:
    """Lines of a histogram of lengths over powers of two."""
    bins = np.floor(np.log2(np.maximum(lengths, 1))).astype(int)
    counts = np.bincount(bins)
    scale = max(1, counts.max())
    return [
        f"{1 << i:>9,} - {(2 << i) - 1:<9,} {count:>10,} {'#' * round(width * count / scale)}" for i, count in enumerate(counts) if count
    ]


def plot_lengths(found: Stats, title: str, path: Path) -> None:
    """Writes a PNG of the documents' lengths, and of the tokens in documents of each length."""
    from matplotlib.figure import Figure

    edges = (2.0 ** np.arange(0, np.log2(found.lengths.max()) + 1.25, 0.25)).tolist()
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.hist(found.lengths, edges, weights=np.full(len(found.lengths), 1 / len(found.lengths)), alpha=0.6, label="documents")
    axes.hist(found.lengths, edges, weights=found.lengths / found.tokens, histtype="step", linewidth=1.5, label="tokens")
    axes.set(xscale="log", xlabel="document length (tokens)", ylabel="share", title=title)
    axes.legend()
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be written ({error}); give a file name that ends in .png") from error


def document(folder: Path, split: str, number: int) -> np.ndarray:
    """The ids of a split's ``number``-th document."""
    _, described = open_split(folder, split)
    left = number
    for shard in described.shards:
        if left < shard.documents:
            data = IndexedDataset(folder / shard.path)
            tokens = data[left]
            data.close()
            return tokens
        left -= shard.documents
    raise UserError(f"document {number} is not in the {split} split of {folder}, which has {described.documents}")


def sample(folder: Path, split: str, number: int, sequence_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Sample ``number`` of concat packing before shuffling: its tokens, and for each the number of its document within the split."""
    _, described = open_split(folder, split)
    first, total = number * sequence_length, described.tokens
    if first >= total:
        raise UserError(f"sample {number} is not in the {split} split of {folder}, which has {-(-total // sequence_length)} of that length")
    last = min(total, first + sequence_length)
    tokens, owners = [], []
    begin = documents = 0
    for shard in described.shards:
        a, b = max(first - begin, 0), min(last - begin, shard.tokens)
        if a < b:
            data = IndexedDataset(folder / shard.path)
            tokens.append(data.read(a, b - a))
            owners.append(documents + np.searchsorted(data.document_starts(), np.arange(a, b), side="right") - 1)
            data.close()
        begin, documents = begin + shard.tokens, documents + shard.documents
    return np.concatenate(tokens), np.concatenate(owners)
