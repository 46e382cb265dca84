"""Where documents come from: text files, JSONL (plain, gz, zst), Parquet, Arrow and Hugging Face datasets, as numbered tasks."""

from __future__ import annotations

import fnmatch
import gzip
import io
import itertools
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_tools.errors import UserError

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
JSONL_SUFFIXES = (".jsonl", ".json", ".ndjson")
COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
TABLE_SUFFIXES = (".parquet", ".arrow")
BYTES_PER_TASK = 32 << 20  # of plain text or JSONL: large files are cut, small ones grouped


@dataclass(frozen=True)
class Part:
    """A range of one file. ``end`` of -1 means its end; only plain JSONL is cut."""

    path: str
    kind: str  # text | jsonl | table | dataset
    begin: int = 0
    end: int = -1

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


@dataclass(frozen=True)
class Record:
    """A document, or what is wrong with a record, and where it stands."""

    text: str | None
    place: str
    problem: str = ""


def find_files(sources: list[str], include: list[str], exclude: list[str]) -> list[Path]:
    """Files named by paths, folders (searched in depth) and globs, sorted, each once. Raises UserError for a source that gives none."""
    found: dict[Path, None] = {}
    for source in sources:
        path = Path(source)
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.is_file() and _wanted(file.relative_to(path), include, exclude))
        elif path.is_file():
            files = [path]
        else:
            anchor = Path(path.anchor) if path.is_absolute() else Path()
            files = sorted(file for file in anchor.glob(str(path.relative_to(path.anchor))) if file.is_file()) if "*" in source else []
        if not files:
            what = "holds no text, JSONL, Parquet or Arrow files that match" if path.is_dir() else "does not exist"
            raise UserError(f"input {source} {what}; check the path, --include and --exclude")
        found.update(dict.fromkeys(files))
    return list(found)


def _wanted(relative: Path, include: list[str], exclude: list[str]) -> bool:
    name = relative.as_posix()
    if any(_matches(name, pattern) for pattern in exclude):
        return False
    return any(_matches(name, pattern) for pattern in include) if include else kind_of(relative) is not None


def _matches(name: str, pattern: str) -> bool:
    """Shell pattern against a relative path; ``**/`` also matches no folder at all."""
    return fnmatch.fnmatchcase(name, pattern) or (pattern.startswith("**/") and fnmatch.fnmatchcase(name, pattern[3:]))


def kind_of(path: Path) -> str | None:
    """text, jsonl or table by the name's ending; None for anything else."""
    name = path.name.removesuffix(".gz").removesuffix(".zst")
    suffix = Path(name).suffix.lower()
    if suffix in JSONL_SUFFIXES:
        return "jsonl"
    if suffix in TABLE_SUFFIXES:
        return "table"
    return "text" if suffix in TEXT_SUFFIXES or not suffix else None


def plan_tasks(files: list[Path]) -> list[list[Part]]:
    """Cuts and groups files into tasks of about ``BYTES_PER_TASK``: a function of the files alone, so output does not depend on workers."""
    tasks: list[list[Part]] = []
    group: list[Part] = []
    weight = 0
    for file in files:
        kind = kind_of(file) or "text"
        size = file.stat().st_size
        if kind == "jsonl" and file.suffix not in COMPRESSED and size > BYTES_PER_TASK:
            count = -(-size // BYTES_PER_TASK)
            edges = [size * i // count for i in range(count)] + [size]
            tasks += [[Part(str(file), kind, a, b)] for a, b in itertools.pairwise(edges)]
            continue
        group.append(Part(str(file), kind))
        weight += size
        if weight >= BYTES_PER_TASK:
            tasks.append(group)
            group, weight = [], 0
    return [*tasks, group] if group else tasks


def read_part(part: Part, text_key: str) -> Iterator[Record]:
    """The documents of a part, in order."""
    if part.kind == "text":
        yield _read_text(Path(part.path))
    elif part.kind == "jsonl":
        yield from _read_jsonl(part, text_key)
    elif part.kind == "table":
        yield from _read_table(Path(part.path), text_key)
    else:
        yield from read_dataset(part.path, text_key)


def open_bytes(path: Path) -> io.BufferedIOBase:
    """A file's bytes, decompressed by its ending."""
    if path.suffix == ".gz":
        try:
            from isal import igzip

            return igzip.open(path, "rb")
        except ImportError:
            return gzip.open(path, "rb")  # type: ignore[return-value]
    if path.suffix == ".zst":
        import zstandard

        return io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(path.open("rb"), closefd=True))
    return path.open("rb")


def _read_text(path: Path) -> Record:
    try:
        with open_bytes(path) as file:
            return Record(file.read().decode("utf-8"), str(path))
    except UnicodeDecodeError as error:
        return Record(None, str(path), f"is not UTF-8 at byte {error.start}")
    except (OSError, EOFError, ValueError) as error:
        return Record(None, str(path), f"cannot be read ({error})")


def _read_jsonl(part: Part, text_key: str) -> Iterator[Record]:
    path, keys = Path(part.path), text_key.split(".")
    position = part.begin
    try:
        with open_bytes(path) as file:
            if part.begin:
                # A line belongs to the range in which it begins; the one cut by the range's start is the range before's.
                file.seek(part.begin - 1)
                position += len(file.readline()) - 1
            number = 0
            while (part.end < 0 or position < part.end) and (line := file.readline()):
                number += 1
                begin, position = position, position + len(line)
                if line.strip():
                    yield _parse_line(line, keys, f"{path}, line {number}" if part.begin == 0 else f"{path}, byte {begin}")
    except (OSError, EOFError, ValueError) as error:
        yield Record(None, str(path), f"cannot be read ({error})")


def _parse_line(line: bytes, keys: list[str], place: str) -> Record:
    import orjson

    try:
        value: Any = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        return Record(None, place, f"is not JSON ({error})")
    for key in keys:
        if not isinstance(value, dict) or key not in value:
            known = ", ".join(value) if isinstance(value, dict) else type(value).__name__
            return Record(None, place, f"has no key {'.'.join(keys)!r} (it has: {known}); name the right one with --text-key")
        value = value[key]
    return (
        Record(value, place)
        if isinstance(value, str)
        else Record(None, place, f"holds {type(value).__name__} under {'.'.join(keys)!r}, not text")
    )


def _read_table(path: Path, text_key: str) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if path.suffix == ".parquet":
            batches: Any = pq.ParquetFile(path).iter_batches(columns=[text_key.split(".")[0]], batch_size=4096)
        else:
            batches = _arrow_batches(path)
        row = 0
        for batch in batches:
            column = batch.column(batch.schema.get_field_index(text_key.split(".")[0]))
            for key in text_key.split(".")[1:]:
                column = column.field(key)
            for value in column.to_pylist():
                row += 1
                yield Record(value, f"{path}, row {row}", "" if isinstance(value, str) else f"holds no text under {text_key!r}")
    except (pa.ArrowException, OSError, KeyError, IndexError) as error:
        yield Record(None, str(path), f"cannot be read, or has no column {text_key!r} ({str(error).splitlines()[0]})")


def _arrow_batches(path: Path) -> Iterator[Any]:
    import pyarrow as pa

    with pa.memory_map(str(path)) as source:
        try:
            reader = pa.ipc.open_file(source)
            yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
        except pa.ArrowInvalid:
            source.seek(0)
            yield from pa.ipc.open_stream(source)


def read_dataset(name: str, text_key: str) -> Iterator[Record]:
    """Rows of anything ``datasets`` loads, streamed: a hub name, ``NAME:CONFIG``, or a folder saved by ``save_to_disk``."""
    import datasets

    try:
        if os.path.isdir(name):
            rows: Any = datasets.load_from_disk(name)
            rows = rows["train"] if isinstance(rows, dict) else rows
        else:
            path, _, config = name.partition(":")
            rows = datasets.load_dataset(path, config or None, split="train", streaming=True)
    except Exception as error:  # the library's errors have no common base
        raise UserError(f"dataset {name} cannot be loaded ({str(error).splitlines()[0]}); check the name, or the network") from error
    for number, row in enumerate(rows, 1):
        value: Any = row
        for key in text_key.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        yield Record(value, f"{name}, row {number}", "" if isinstance(value, str) else f"has no text under {text_key!r}")
