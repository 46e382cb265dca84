"""Which files hold the text, and how they are cut into tasks that can be worked on apart."""

from __future__ import annotations

import fnmatch
import glob
import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from data_tools.errors import UserError
from data_tools.parts import Part, Task
from data_tools.readers import dataset_shards, open_parquet
from data_tools.storage import COMPRESSED, HASH_BLOCK, block_count, connect, is_url, local_path, reaching, size_of

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py", ".html", ".tex")
JSONL_SUFFIXES = (".jsonl", ".json", ".ndjson")
SMALLEST_TASK, LARGEST_TASK = 8 << 20, 512 << 20  # bytes of input
TASKS_WANTED = 512


def find_files(sources: Sequence[str], include: Sequence[str], exclude: Sequence[str]) -> list[str]:
    """Files named by paths, folders (searched in depth), globs and URLs; sorted within each source, each once.

    Raises UserError for a source that gives none.
    """
    found: dict[str, None] = {}
    for source in map(local_path, sources):
        files = list(_files_of(source, include, exclude))
        if not files:
            exists = os.path.isdir(source) or (is_url(source) and not glob.has_magic(source))
            what = "holds no text, JSONL, Parquet or Arrow files that match" if exists else "does not exist"
            raise UserError(f"input {source} {what}; check the path, --include and --exclude")
        found.update(dict.fromkeys(files))
    if not found:
        raise UserError("no input is named; give files, folders, globs or URLs, or --files-from LIST")
    return list(found)


def _files_of(source: str, include: Sequence[str], exclude: Sequence[str]) -> Iterator[str]:
    if is_url(source):
        filesystem, inner = connect(source)
        protocol = source.partition("://")[0]
        with reaching(source):
            below = filesystem.glob(inner, detail=True) if glob.has_magic(source) else filesystem.find(inner, detail=True)
        for path in sorted(path for path, info in below.items() if info["type"] == "file"):
            relative = path.removeprefix(inner).lstrip("/")
            if not relative or glob.has_magic(source) or _wanted(relative, include, exclude):
                yield f"{protocol}://{path.lstrip('/')}"
    elif os.path.isdir(source):
        for path in sorted(_walk(source)):
            if _wanted(os.path.relpath(path, source), include, exclude):
                yield path
    elif os.path.exists(source):
        yield source
    elif glob.has_magic(source):
        yield from sorted(path for path in glob.glob(source, recursive=True) if os.path.isfile(path))


def _walk(folder: str) -> Iterator[str]:
    for place, _, names in os.walk(folder, followlinks=True):
        yield from (path for name in names if os.path.isfile(path := os.path.join(place, name)))


def _wanted(relative: str, include: Sequence[str], exclude: Sequence[str]) -> bool:
    if any(_matches(relative, pattern) for pattern in exclude):
        return False
    if include:
        return any(_matches(relative, pattern) for pattern in include)
    return not os.path.basename(relative).startswith(".") and kind_of(relative) is not None


def _matches(name: str, pattern: str) -> bool:
    """Shell pattern against a relative path; ``**/`` also matches no folder at all."""
    return fnmatch.fnmatchcase(name, pattern) or (pattern.startswith("**/") and fnmatch.fnmatchcase(name, pattern[3:]))


def kind_of(path: str) -> str | None:
    """The kind of a file by the name's ending, compression apart; None for anything else."""
    for ending in COMPRESSED:
        path = path.removesuffix(ending)
    suffix = os.path.splitext(path)[1].lower()
    if suffix in JSONL_SUFFIXES:
        return "jsonl"
    if suffix in (".parquet", ".arrow"):
        return suffix[1:]
    return "text" if suffix in TEXT_SUFFIXES or not suffix else None


def read_list(path: Path) -> list[str]:
    """Inputs named in a file, one a line; empty lines and lines that begin with # are passed over."""
    if not path.is_file():
        raise UserError(f"file list {path} does not exist; check --files-from")
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise UserError(f"file list {path} is not UTF-8 text; give one path a line") from error
    return [line for line in lines if line and not line.startswith("#")]


def plan_tasks(files: Sequence[str], kind: str | None = None) -> list[Task]:
    """Cuts large files and groups small ones into tasks. A function of the files alone, so that output does not depend on workers.

    A task becomes one shard a split; its size grows with the input, from 8 MiB to 512 MiB of input, so that there are about 512 of them.
    """
    sizes = [size_of(file) for file in files]
    wanted = min(max(sum(sizes) // TASKS_WANTED, SMALLEST_TASK), LARGEST_TASK)
    wanted = -(-wanted // HASH_BLOCK) * HASH_BLOCK
    tasks: list[Task] = []
    group: Task = []
    weight = 0
    for file, size in zip(files, sizes, strict=True):
        whole = Part(file, kind or kind_of(file) or "text", size, blocks=(0, 0) if is_url(file) else (0, block_count(size)))
        pieces = _cut(whole, wanted) if size > wanted else [whole]
        if len(pieces) > 1 or weight + size > wanted:
            tasks += [group] if group else []
            group, weight = [], 0
        if len(pieces) > 1:
            tasks += [[piece] for piece in pieces]
        else:
            group.append(whole)
            weight += size
    return [*tasks, group] if group else tasks


def _cut(whole: Part, wanted: int) -> list[Part]:
    """The parts of a large file; one, where its format cannot be entered in the middle."""
    if whole.kind == "jsonl" and not whole.path.endswith(COMPRESSED):
        edges = [*range(0, whole.size, wanted), whole.size]
        return [
            replace(whole, size=b - a, begin=a, end=b, blocks=(a // HASH_BLOCK, -(-b // HASH_BLOCK)) if whole.blocks[1] else (0, 0))
            for a, b in itertools.pairwise(edges)
        ]
    if whole.kind == "parquet":
        return _cut_rows(whole, _row_group_sizes(whole.path), wanted)
    return [whole]


def _row_group_sizes(path: str) -> list[int]:
    import pyarrow.parquet as pq

    metadata: pq.FileMetaData = open_parquet(path).metadata
    return [metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)]


def _cut_rows(whole: Part, sizes: list[int], wanted: int) -> list[Part]:
    """Runs of row groups of about ``wanted`` bytes; the file's checksum is shared out among them."""
    count = max(1, min(len(sizes), -(-whole.size // wanted)))
    edges = [len(sizes) * i // count for i in range(count + 1)]
    blocks = [whole.blocks[1] * i // count for i in range(count + 1)]
    return [
        replace(whole, size=whole.size // count, begin=edges[i], end=edges[i + 1], blocks=(blocks[i], blocks[i + 1])) for i in range(count)
    ]


def plan_datasets(names: Sequence[str]) -> list[Task]:
    """One task for each shard of each ``datasets`` dataset (see ``readers.load_dataset``)."""
    tasks: list[Task] = []
    for name in names:
        count = dataset_shards(name)
        tasks += [[Part(name, "dataset", 0, i, count)] for i in range(count)]
    return tasks
