"""Proof that a dataset is what was written: checksums, counts, boundaries, ids, tokenizer, and on request the inputs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.errors import UserError
from data_tools.indexed import IndexedDataset, index_size, paths
from data_tools.manifest import Manifest, Shard, xxh3
from data_tools.storage import file_hash
from data_tools.tokenizers import load_tokenizer


def verify(folder: Path, inputs: bool = False) -> list[str]:
    """What is wrong with a dataset: missing, strange, truncated or changed files; ids outside the vocabulary; documents without their end.

    With ``inputs`` the text files are compared too with what was read. Empty when all is well.
    """
    manifest = Manifest.load(folder)
    problems = [*_tokenizer_problems(folder, manifest), *_strangers(folder, manifest)]
    for split in manifest.splits.values():
        for shard in split.shards:
            problems += list(_file_problems(folder, shard)) or list(_content_problems(folder, shard, manifest))
    return [*problems, *(_input_problems(manifest.inputs) if inputs else [])]


def _tokenizer_problems(folder: Path, manifest: Manifest) -> Iterator[str]:
    try:
        if load_tokenizer(folder / "tokenizer").hash != manifest.tokenizer.hash:
            yield f"{folder / 'tokenizer'} is not the tokenizer that made the dataset"
    except UserError as error:
        yield str(error).partition("; ")[0]


def _strangers(folder: Path, manifest: Manifest) -> Iterator[str]:
    for name, split in manifest.splits.items():
        known = {path for shard in split.shards for path in paths(folder / shard.path)}
        if (folder / name).is_dir():
            yield from (f"{path} is not in the manifest" for path in sorted((folder / name).iterdir()) if path not in known)


def _file_problems(folder: Path, shard: Shard) -> Iterator[str]:
    sizes = (shard.tokens * np.dtype(shard.dtype).itemsize, index_size(shard.documents, shard.documents + 1))
    for path, size, expected in zip(paths(folder / shard.path), sizes, (shard.xxh3_bin, shard.xxh3_idx), strict=True):
        if not path.is_file():
            yield f"{path} is missing"
        elif (found := path.stat().st_size) != size:
            yield f"{path} has {found} bytes instead of {size}: it is {'truncated' if found < size else 'damaged'}"
        elif xxh3(path) != expected:
            yield f"{path} has another checksum than when it was written: some of its bytes changed"


def _content_problems(folder: Path, shard: Shard, manifest: Manifest) -> Iterator[str]:
    data = IndexedDataset(folder / shard.path)
    if (len(data), data.n_tokens, data.dtype.name) != (shard.documents, shard.tokens, shard.dtype):
        yield f"{data.idx_path} describes {len(data)} documents and {data.n_tokens} tokens of {data.dtype}; its manifest says otherwise"
    check_end = manifest.policies.get("append_eos") is True
    for tokens, lengths in data.batches():
        if len(tokens) and int(tokens.max()) >= manifest.tokenizer.vocab_size:
            yield f"{data.bin_path} holds the id {int(tokens.max())}, outside the vocabulary of {manifest.tokenizer.vocab_size}"
            break
        if check_end and np.any(tokens[np.cumsum(lengths) - 1] != manifest.tokenizer.eos_id):
            yield f"{data.bin_path} holds a document that does not end with the end token {manifest.tokenizer.eos_id}"
            break
    data.close()


def _input_problems(inputs: list[dict[str, Any]]) -> Iterator[str]:
    for row in inputs:
        path, expected = row.get("path", ""), row.get("xxh3")
        if not expected:
            continue
        if not os.path.isfile(path):
            yield f"input {path} is missing"
        elif file_hash(path) != expected:
            yield f"input {path} is not the file that was tokenized"
