"""Looking at a dataset: verify its checksums, count it, decode its documents."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_tools.errors import UserError
from data_tools.indexed import IndexedDataset, paths
from data_tools.manifest import Manifest, xxh3
from data_tools.tokenizers import Tokenizer, load_tokenizer


def verify(folder: Path) -> list[str]:
    """What is wrong with a dataset: missing, truncated or changed files; ids outside the vocabulary. Empty when all is well."""
    manifest = Manifest.load(folder)
    problems = []
    for split in manifest.splits.values():
        for shard in split.shards:
            for path, expected in zip(paths(folder / shard.path), (shard.xxh3_bin, shard.xxh3_idx), strict=True):
                if not path.is_file():
                    problems.append(f"{path} is missing")
                elif xxh3(path) != expected:
                    problems.append(f"{path} has another checksum than when it was written ({path.stat().st_size} bytes)")
    if not problems:
        problems += _check_contents(folder, manifest)
    try:
        if load_tokenizer(folder / "tokenizer").hash != manifest.tokenizer.hash:
            problems.append(f"{folder / 'tokenizer'} is not the tokenizer that made the dataset")
    except UserError as error:
        problems.append(str(error))
    return problems


def _check_contents(folder: Path, manifest: Manifest) -> Iterator[str]:
    for split in manifest.splits.values():
        for shard in split.shards:
            data = IndexedDataset(folder / shard.path)
            if (len(data), data.n_tokens, data.dtype.name) != (shard.documents, shard.tokens, shard.dtype):
                yield f"{data.idx_path} describes {len(data)} documents, {data.n_tokens} tokens of {data.dtype}; its manifest says otherwise"
            for block in blocks(data):
                if len(block) and int(block.max()) >= manifest.tokenizer.vocab_size:
                    yield f"{data.bin_path} holds the id {int(block.max())}, outside the vocabulary of {manifest.tokenizer.vocab_size}"
                    break
            data.close()


def blocks(data: IndexedDataset, size: int = 1 << 22) -> Iterator[np.ndarray]:
    """All tokens of a shard in pieces."""
    for first in range(0, data.n_tokens, size):
        yield data.read(first, min(size, data.n_tokens - first))


def token_counts(folder: Path, split: str) -> np.ndarray:
    """(vocab,) int64: how often each id occurs in a split."""
    manifest = Manifest.load(folder)
    counts = np.zeros(manifest.tokenizer.vocab_size, dtype=np.int64)
    for shard in manifest.splits[split].shards:
        data = IndexedDataset(folder / shard.path)
        for block in blocks(data):
            counts += np.bincount(block, minlength=len(counts))
        data.close()
    return counts


@dataclass(frozen=True)
class Stats:
    """Figures of one split. ``lengths`` are the documents' in tokens; ``unigram_entropy`` is in nats per token."""

    split: str
    documents: int
    tokens: int
    bytes_per_token: float | None
    lengths: np.ndarray
    top_tokens: list[tuple[str, float]]
    unigram_entropy: float

    def truncated(self, sequence_length: int) -> float:
        """Share of the documents that would fit into a sequence but are cut by concat-and-chunk packing."""
        starts = np.cumsum(self.lengths) - self.lengths
        fits = self.lengths <= sequence_length
        crosses = starts // sequence_length != (starts + self.lengths - 1) // sequence_length
        return float((fits & crosses).sum() / max(1, fits.sum()))


def stats(folder: Path, split: str, top: int = 12) -> Stats:
    """Counts a split."""
    manifest = Manifest.load(folder)
    if split not in manifest.splits:
        raise UserError(f"dataset {folder} has no split {split!r}; it has {', '.join(manifest.splits)}")
    tokenizer = load_tokenizer(folder / "tokenizer")
    described = manifest.splits[split]
    counts = token_counts(folder, split)
    shares = counts[counts > 0] / counts.sum()
    lengths = np.concatenate([np.asarray(IndexedDataset(folder / shard.path).lengths) for shard in described.shards])
    common = Counter(dict(enumerate(counts.tolist()))).most_common(top)
    return Stats(
        split,
        described.documents,
        described.tokens,
        described.text_bytes / described.tokens if described.text_bytes else None,
        lengths,
        [(shown(tokenizer, token), count / described.tokens) for token, count in common],
        float(-(shares * np.log(shares)).sum()),
    )


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


def document(folder: Path, split: str, number: int) -> np.ndarray:
    """The ids of a split's ``number``-th document."""
    manifest = Manifest.load(folder)
    if split not in manifest.splits:
        raise UserError(f"dataset {folder} has no split {split!r}; it has {', '.join(manifest.splits)}")
    left = number
    for shard in manifest.splits[split].shards:
        if left < shard.documents:
            data = IndexedDataset(folder / shard.path)
            return data[left]
        left -= shard.documents
    raise UserError(f"document {number} is not in the {split} split of {folder}, which has {manifest.splits[split].documents}")
