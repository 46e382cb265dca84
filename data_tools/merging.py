"""Putting datasets together, and dividing one: shards are linked where all their documents stay, and written anew where some go."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from data_tools import folders
from data_tools.dedup import HASH, document_hash, duplicates
from data_tools.errors import UserError
from data_tools.indexed import IndexedDataset, IndexedWriter, paths
from data_tools.manifest import Manifest, Shard, Split
from data_tools.tokenizers import Tokenizer, load_tokenizer
from data_tools.worker import split_hash

Sources = dict[str, list[tuple[Path, Shard]]]  # by split: each shard and the dataset that holds it


def merge(inputs: list[Path], out: Path, overwrite: bool = False, dedup: bool = False) -> Manifest:
    """One dataset with the shards of all, in the order given; with ``dedup`` every document only once, training documents first.

    Raises UserError when their tokenizers or control tokens differ, or ``out`` holds files.
    """
    manifests = [Manifest.load(folder) for folder in inputs]
    for folder, manifest in zip(inputs, manifests, strict=True):
        _check_alike(folder, manifest, inputs[0], manifests[0])
    sources: Sources = {}
    for folder, manifest in zip(inputs, manifests, strict=True):
        for name, split in manifest.splits.items():
            sources.setdefault(name, []).extend((folder, shard) for shard in split.shards)
    with _Making(out, inputs[0], overwrite) as making:
        dropped = _duplicates(sources, making.work) if dedup else {}
        splits = {name: Split() for name in sources}
        for number, (name, folder, shard) in enumerate(_each(sources)):
            making.add(splits[name], name, folder, shard, without=dropped.get(number))
        counts = {key: sum(manifest.counts.get(key, 0) for manifest in manifests) for key in manifests[0].counts}
        counts["duplicates"] = counts.get("duplicates", 0) + sum(len(places) for places in dropped.values())
        return making.publish(splits, manifests, counts)


def split(folder: Path, out: Path, fraction: float, seed: int, overwrite: bool = False) -> Manifest:
    """The same dataset with a share of its training documents moved to validation, chosen by a hash of their tokens.

    Stable under re-sharding: where a document stands does not matter. Raises UserError for a dataset without training documents.
    """
    manifest = Manifest.load(folder)
    below = int(fraction * 2**64)
    with _Making(out, folder, overwrite) as making:
        splits = {"train": Split(), "validation": Split()}
        for shard in manifest.splits.get("validation", Split()).shards:
            making.add(splits["validation"], "validation", folder, shard)
        for shard in manifest.splits["train"].shards:
            chosen = np.array([split_hash(tokens, seed) < below for tokens in _documents(folder / shard.path)], dtype=bool)
            making.add(splits["train"], "train", folder, shard, without=np.flatnonzero(chosen))
            making.add(splits["validation"], "validation", folder, shard, without=np.flatnonzero(~chosen))
        splits = {name: split for name, split in splits.items() if split.shards}
        if "train" not in splits:
            raise UserError(f"a share of {fraction} leaves no training documents of {folder}; lower --validation-fraction")
        return making.publish(splits, [manifest], manifest.counts)


def _check_alike(folder: Path, manifest: Manifest, first_folder: Path, first: Manifest) -> None:
    if manifest.tokenizer.hash != first.tokenizer.hash:
        raise UserError(f"{folder} and {first_folder} were tokenized with different tokenizers; tokenize one of them again")
    for policy in ("append_eos", "prepend_bos"):
        if manifest.policies.get(policy) != first.policies.get(policy):
            raise UserError(f"{folder} and {first_folder} differ in {policy}; tokenize one of them again with the other's options")


def _each(sources: Sources) -> Iterator[tuple[str, Path, Shard]]:
    for name in sorted(sources):  # train before validation: a document in both stays where it is trained on, not where it measures
        yield from ((name, folder, shard) for folder, shard in sources[name])


def _documents(prefix: Path) -> Iterator[bytes]:
    """Each document's ids as bytes of int32, whatever the file's dtype."""
    data = IndexedDataset(prefix)
    for tokens, lengths in data.batches():
        body, ends = tokens.astype("<i4").tobytes(), np.cumsum(lengths, dtype=np.int64)
        yield from (body[4 * (end - n) : 4 * end] for end, n in zip(ends.tolist(), lengths.tolist(), strict=True))
    data.close()


def _duplicates(sources: Sources, work: Path) -> dict[int, np.ndarray]:
    """Numbers of the documents to drop from each shard, by the shard's place in ``_each``."""
    folder = work / ".work" / "hashes"
    folder.mkdir(parents=True)
    files = []
    for number, (_, dataset, shard) in enumerate(_each(sources)):
        files.append(folder / f"{number}.bin")
        np.fromiter((document_hash(tokens) for tokens in _documents(dataset / shard.path)), dtype=HASH).tofile(files[-1])
    dropped: dict[int, list[np.ndarray]] = {}
    for number, places in duplicates(files):
        dropped.setdefault(number, []).append(places)
    return {number: np.sort(np.concatenate(places)) for number, places in dropped.items()}


class _Making:
    """A dataset in the making: shards are added, then it is published; on an error nothing is left."""

    def __init__(self, out: Path, tokenizer_of: Path, overwrite: bool) -> None:
        folders.check_free(out, overwrite)
        self.out, self.work, self.tokenizer_folder = out, folders.work_folder(out), tokenizer_of / "tokenizer"
        self.tokenizer: Tokenizer = load_tokenizer(self.tokenizer_folder)

    def __enter__(self) -> _Making:
        if self.work.exists():
            raise UserError(f"{self.work} holds unfinished work; finish it with the command that began it, or delete it")
        folders.make(self.work)
        return self

    def __exit__(self, *error: object) -> None:
        shutil.rmtree(self.work, ignore_errors=True)

    def add(self, split: Split, name: str, folder: Path, shard: Shard, without: np.ndarray | None = None) -> None:
        """Adds a shard, less the documents of these numbers."""
        path = f"{name}/{len(split.shards):05d}"
        (self.work / name).mkdir(exist_ok=True)
        if without is None or not len(without):
            for source, copy in zip(paths(folder / shard.path), paths(self.work / path), strict=True):
                _link(source, copy)
            split.shards.append(replace(shard, path=path))
        elif len(without) < shard.documents:
            split.shards.append(self._filtered(folder / shard.path, shard, without, path))

    def _filtered(self, prefix: Path, shard: Shard, without: np.ndarray, path: str) -> Shard:
        keep = np.ones(shard.documents, dtype=bool)
        keep[without] = False
        data, first, removed_bytes = IndexedDataset(prefix), 0, 0
        with IndexedWriter(self.work / path, data.dtype) as writer:
            for tokens, lengths in data.batches():
                stays = keep[first : first + len(lengths)]
                first += len(lengths)
                writer.add(tokens[np.repeat(stays, lengths)], lengths[stays])
                ends = np.cumsum(lengths, dtype=np.int64)
                gone = ((ends[i] - lengths[i], ends[i]) for i in np.flatnonzero(~stays))
                removed_bytes += sum(len(self.tokenizer.decode(tokens[a:b].tolist()).encode()) for a, b in gone)
        data.close()
        text_bytes = max(0, shard.text_bytes - removed_bytes) if shard.text_bytes else 0
        return Shard(path, writer.documents, writer.tokens, data.dtype.name, writer.xxh3_bin, writer.xxh3_idx, text_bytes)

    def publish(self, splits: dict[str, Split], manifests: list[Manifest], counts: dict[str, int]) -> Manifest:
        """Writes the manifest and gives the folder its name."""
        first = manifests[0]
        counts |= {"documents": sum(s.documents for s in splits.values()), "tokens": sum(s.tokens for s in splits.values())}
        inputs = [row for manifest in manifests for row in manifest.inputs]
        manifest = Manifest(first.tokenizer, splits, first.policies, inputs, counts, " ".join(sys.argv), first.versions)
        shutil.copytree(self.tokenizer_folder, self.work / "tokenizer")
        manifest.save(self.work)
        shutil.rmtree(self.work / ".work", ignore_errors=True)
        folders.publish(self.work, self.out)
        return manifest


def _link(source: Path, copy: Path) -> None:
    if not source.is_file():
        raise UserError(f"{source} is missing; run `mamba-data verify` on its dataset")
    try:
        os.link(source, copy)
    except OSError:  # another file system: copy
        shutil.copy2(source, copy)
