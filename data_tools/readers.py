"""Documents of each kind of input: text files, JSONL (plain, gz, zst), Parquet, Arrow and Hugging Face datasets.

A reader yields a document's text, or a ``Problem`` for a record that holds none; it never raises for what stands in a file.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import xxhash

from data_tools.errors import UserError
from data_tools.parts import Part
from data_tools.storage import COMPRESSED, READ_ERRORS, hash_blocks, is_url, open_decompressed, open_raw

DATASET_SHARD = 256 << 20  # bytes of a saved dataset that make one task
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Problem:
    """A record that is no document: where it stands and what is wrong."""

    place: str
    what: str


Reading = Iterator["str | Problem"]


def read_part(part: Part, text_key: str, digests: list[str] | None = None) -> Reading:
    """The documents of a part, in order. If ``digests`` is given, the checksums of the part's blocks are appended to it on the way."""
    if part.kind == "text":
        yield _read_text(part, digests)
        return
    try:
        if digests is not None and part.blocks[1]:
            digests += hash_blocks(part.path, *part.blocks)
    except OSError as error:
        yield Problem(part.path, f"cannot be read ({error.strerror})")
        return
    yield from READERS[part.kind](part, text_key)


def _read_text(part: Part, digests: list[str] | None) -> str | Problem:
    try:
        with open_raw(part.path) as file:
            raw = file.read()
        if digests is None:
            pass
        elif part.blocks == (0, 1):
            digests.append(xxhash.xxh3_128_hexdigest(raw))
        elif part.blocks[1]:
            digests += hash_blocks(part.path, *part.blocks)
        if part.path.endswith(COMPRESSED):
            with open_decompressed(part.path) as file:
                raw = file.read()
        return raw.removeprefix(BYTE_ORDER_MARK).decode("utf-8")
    except UnicodeDecodeError as error:
        return Problem(part.path, f"is not UTF-8 at byte {error.start}")
    except READ_ERRORS as error:
        return Problem(part.path, f"cannot be read ({error.strerror if isinstance(error, OSError) and error.strerror else error})")


def _read_jsonl(part: Part, text_key: str) -> Reading:
    """A line belongs to the part in which it begins; one cut by the part's start is the part before's."""
    import orjson

    keys, position, number = text_key.split("."), part.begin, 0
    try:
        with open_decompressed(part.path) as file:
            if part.begin:
                file.seek(part.begin - 1)
                position += len(file.readline()) - 1
            elif not part.path.endswith(COMPRESSED) and file.read(3) != BYTE_ORDER_MARK:
                file.seek(0)
            for line in file:
                if 0 <= part.end <= position:
                    break
                position += len(line)
                number += 1
                try:
                    value = orjson.loads(line)
                    for key in keys:
                        value = value[key]
                except (orjson.JSONDecodeError, KeyError, TypeError, IndexError):
                    value = None
                if isinstance(value, str):
                    texts, line, value = [value], b"", None  # a document may be large: nothing of it is held here while it is encoded
                    yield texts.pop()
                elif not line.isspace():
                    yield Problem(f"{part.path}, line {number + _lines_before(part)}", _what_is_wrong(line, keys))
    except READ_ERRORS as error:
        yield Problem(part.path, f"cannot be read after line {number + _lines_before(part)} ({error})")


def _lines_before(part: Part) -> int:
    """Lines that begin before the part does: counted only when there is something to report."""
    count, left = 0, part.begin
    with open_raw(part.path) as file:
        while left and (block := file.read(min(left, 1 << 22))):
            count += block.count(b"\n")
            left -= len(block)
            last = block
    return count + (part.begin > 0 and not last.endswith(b"\n"))


def _what_is_wrong(line: bytes, keys: list[str]) -> str:
    import orjson

    try:
        value: Any = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        return f"is not a JSON object of its own ({error.msg})"
    for key in keys:
        if not isinstance(value, dict):
            return f"holds {_kind(value)} where an object with the key {key!r} should be"
        if key not in value:
            return f"has no key {'.'.join(keys)!r} (it has: {', '.join(value) or 'none'}); name the right one with --text-key"
        value = value[key]
    return f"holds {_kind(value)} under {'.'.join(keys)!r}, not text"


def _kind(value: Any) -> str:
    return {"NoneType": "null", "dict": "an object", "list": "a list", "bool": "a truth value"}.get(type(value).__name__, "a number")


def open_parquet(path: str) -> Any:
    """pyarrow's reader of a file. Raises UserError for what is no Parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(open_raw(path) if is_url(path) else path)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a Parquet file, or is damaged ({_first_line(error)}); copy it again or leave it out") from error


def _read_parquet(part: Part, text_key: str) -> Reading:
    import pyarrow as pa

    row = 0
    try:
        file = open_parquet(part.path)
        last = file.metadata.num_row_groups if part.end < 0 else part.end
        groups = list(range(part.begin, last))
        row = sum(file.metadata.row_group(i).num_rows for i in range(part.begin))
        column = text_key.split(".")[0]
        if column not in file.schema_arrow.names:
            yield Problem(part.path, _no_column(column, file.schema_arrow.names))
            return
        for batch in file.iter_batches(batch_size=1024, row_groups=groups, columns=[column]):
            yield from _column(batch, text_key, part.path, row)
            row += len(batch)
    except UserError as error:
        yield Problem(part.path, str(error).removeprefix(f"{part.path} ").partition(";")[0])
    except (pa.ArrowException, OSError, ValueError) as error:
        yield Problem(part.path, f"cannot be read after row {row} ({_first_line(error)})")


def _no_column(column: str, names: list[str]) -> str:
    return f"has no column {column!r} (it has: {', '.join(names)}); name the right one with --text-key"


def _read_arrow(part: Part, text_key: str) -> Reading:
    import pyarrow as pa

    row = 0
    try:
        with pa.memory_map(part.path) if not is_url(part.path) else open_raw(part.path) as source:
            for batch in _record_batches(source):
                yield from _column(batch, text_key, part.path, row)
                row += len(batch)
    except (pa.ArrowException, OSError, ValueError) as error:
        yield Problem(part.path, f"cannot be read as Arrow after row {row} ({_first_line(error)})")


def _record_batches(source: Any) -> Iterator[Any]:
    import pyarrow as pa

    try:
        reader = pa.ipc.open_file(source)
    except pa.ArrowInvalid:
        source.seek(0)
        yield from pa.ipc.open_stream(source)
        return
    yield from (reader.get_batch(i) for i in range(reader.num_record_batches))


def _column(batch: Any, text_key: str, path: str, rows_before: int) -> Reading:
    """The texts of a record batch, leading into structs by dots."""
    first, *deeper = text_key.split(".")
    if first not in batch.schema.names:
        yield Problem(path, _no_column(first, batch.schema.names))
        return
    for row, value in enumerate(batch.column(first), rows_before + 1):
        value = value.as_py()
        for key in deeper:
            value = value.get(key) if isinstance(value, dict) else None
        if isinstance(value, str):
            yield value
        else:
            yield Problem(f"{path}, row {row}", f"holds {_kind(value)} under {text_key!r}, not text")


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def load_dataset(name: str) -> Any:
    """Opens ``NAME[:CONFIG[:SPLIT]]`` with Hugging Face ``datasets``: a folder written by ``save_to_disk``, or anything ``load_dataset`` takes,
    streamed. The split is train unless named. Raises UserError when the library cannot open it.
    """
    import datasets

    path, _, rest = name.partition(":")
    config, _, split = rest.partition(":")
    try:
        if os.path.isdir(path) and any(os.path.exists(os.path.join(path, mark)) for mark in ("state.json", "dataset_dict.json")):
            rows = datasets.load_from_disk(path)
            return rows[split or "train"] if isinstance(rows, dict) else rows
        return datasets.load_dataset(path, config or None, split=split or "train", streaming=True)
    except Exception as error:  # the library's errors have no common base
        raise UserError(f"dataset {name} cannot be loaded ({_first_line(error)}); check the name, the split, or the network") from error


def dataset_shards(name: str) -> int:
    """Into how many tasks a dataset can be cut."""
    rows = load_dataset(name)
    if hasattr(rows, "num_shards"):
        return max(1, rows.num_shards)
    return max(1, min(len(rows), int(rows.data.nbytes) // DATASET_SHARD))


def _read_dataset(part: Part, text_key: str) -> Reading:
    rows = load_dataset(part.path)
    streamed = hasattr(rows, "num_shards")
    if part.end > 1:
        rows = rows.shard(part.end, part.begin) if streamed else rows.shard(part.end, part.begin, contiguous=True)
    if not streamed:
        rows = rows.select_columns([text_key.split(".")[0]]) if text_key.split(".")[0] in rows.column_names else rows
    for number, row in enumerate(_rows(rows, part.path), 1):
        value: Any = row
        for key in text_key.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if isinstance(value, str):
            yield value
        else:
            where = f"{part.path}, shard {part.begin} of {part.end}, row {number}" if part.end > 1 else f"{part.path}, row {number}"
            yield Problem(where, f"holds no text under {text_key!r} (it has: {', '.join(row)}); name it with --text-key")


def _rows(rows: Any, name: str) -> Iterator[Any]:
    try:
        yield from rows
    except Exception as error:  # network, damaged files: the library's errors have no common base
        raise UserError(f"dataset {name} broke off ({_first_line(error)}); run the same command again to continue") from error


READERS: dict[str, Callable[[Part, str], Reading]] = {
    "jsonl": _read_jsonl,
    "parquet": _read_parquet,
    "arrow": _read_arrow,
    "dataset": _read_dataset,
}
