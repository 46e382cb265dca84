"""Putting datasets together."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from data_tools.errors import UserError
from data_tools.indexed import paths
from data_tools.manifest import Manifest, Split


def merge(folders: list[Path], out: Path, overwrite: bool = False) -> Manifest:
    """One dataset with the shards of all, in the order given. Raises UserError when their tokenizers differ or ``out`` holds files."""
    if out.exists() and any(out.iterdir()) and not overwrite:
        raise UserError(f"{out} already holds files; choose another --output or pass --overwrite")
    manifests = [Manifest.load(folder) for folder in folders]
    first = manifests[0]
    for folder, manifest in zip(folders, manifests, strict=True):
        if manifest.tokenizer.hash != first.tokenizer.hash:
            raise UserError(f"{folder} and {folders[0]} were tokenized with different tokenizers; tokenize one of them again")
    work = out.with_name(f"{out.name}.partial")
    if work.exists():
        shutil.rmtree(work)
    splits: dict[str, Split] = {}
    for folder, manifest in zip(folders, manifests, strict=True):
        for name, split in manifest.splits.items():
            target = splits.setdefault(name, Split())
            (work / name).mkdir(parents=True, exist_ok=True)
            for shard in split.shards:
                path = f"{name}/{len(target.shards):05d}"
                for source, copy in zip(paths(folder / shard.path), paths(work / path), strict=True):
                    _link(source, copy)
                target.shards.append(type(shard)(**{**vars(shard), "path": path}))
    shutil.copytree(folders[0] / "tokenizer", work / "tokenizer")
    counts = {key: sum(manifest.counts.get(key, 0) for manifest in manifests) for key in first.counts}
    inputs = [row for manifest in manifests for row in manifest.inputs]
    merged = Manifest(first.tokenizer, splits, first.policies, inputs, counts, " ".join(sys.argv), first.versions)
    merged.save(work)
    if out.exists():
        shutil.rmtree(out)
    os.replace(work, out)
    return merged


def _link(source: Path, copy: Path) -> None:
    if not source.is_file():
        raise UserError(f"{source} is missing; run `mamba-data verify` on its dataset")
    try:
        os.link(source, copy)
    except OSError:
        shutil.copy2(source, copy)
