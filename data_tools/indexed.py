"""The Megatron ``.bin``/``.idx`` format: the only place that knows its bytes.

``.bin`` holds raw token ids. ``.idx`` holds, little-endian: magic, version (u64), dtype code (u8), sequence count (u64), document count (u64),
sequence lengths (i32), byte pointers into the ``.bin`` (i64), document indices (i64; the sequence at which each document begins, and the end).
Here every document is one sequence, as Megatron-LM's own preprocessing writes it.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType

import numpy as np
import xxhash

from data_tools.errors import UserError
from data_tools.storage import write_whole

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES: dict[int, type[np.generic]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    6: np.float64,
    7: np.float32,
    8: np.uint16,
}
CODES = {np.dtype(kind): code for code, kind in DTYPES.items()}
UINT16_BELOW = 65_500  # Megatron-LM's own limit: smaller vocabularies have two-byte ids


def best_dtype(vocab_size: int) -> np.dtype:
    """uint16 for vocabularies of fewer than 65,500 tokens, else int32: Megatron-LM's choice."""
    return np.dtype(np.uint16 if vocab_size < UINT16_BELOW else np.int32)


def paths(prefix: str | Path) -> tuple[Path, Path]:
    """The ``.bin`` and ``.idx`` of a prefix."""
    return Path(f"{prefix}.bin"), Path(f"{prefix}.idx")


def index_size(sequences: int, documents: int) -> int:
    """Bytes of an ``.idx`` with so many sequences and document indices (one more than there are documents)."""
    return HEADER.size + 12 * sequences + 8 * documents


def index_bytes(lengths: np.ndarray, dtype: np.dtype) -> bytes:
    """The whole ``.idx`` for documents of these lengths."""
    lengths = np.ascontiguousarray(lengths, dtype=np.int32)
    pointers = np.zeros(len(lengths), dtype=np.int64)
    np.cumsum(lengths[:-1], out=pointers[1:], dtype=np.int64)
    pointers *= dtype.itemsize
    documents = np.arange(len(lengths) + 1, dtype=np.int64)
    header = HEADER.pack(MAGIC, VERSION, CODES[dtype], len(lengths), len(documents))
    return b"".join([header, lengths.tobytes(), pointers.tobytes(), documents.tobytes()])


class IndexedWriter:
    """Writes one ``.bin``/``.idx`` pair; memory holds the lengths only.

    Files are written under temporary names and renamed when the writer is closed without an error, the ``.bin`` first: an ``.idx`` under its
    final name always has a whole ``.bin``.
    """

    def __init__(self, prefix: str | Path, dtype: np.dtype | type[np.generic]) -> None:
        self.bin_path, self.idx_path = paths(prefix)
        self.dtype = np.dtype(dtype)
        self.documents = 0
        self.tokens = 0
        self._lengths: list[np.ndarray] = []
        self.xxh3_bin = self.xxh3_idx = ""
        self._digest = xxhash.xxh3_128()
        # The process's number keeps a worker that outlived its killed parent from writing into the same file as its successor.
        self._temporary = self.bin_path.with_name(f".tmp-{os.getpid()}-{self.bin_path.name}")
        self.bin_path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._temporary.open("wb")

    def add(self, tokens: np.ndarray, lengths: Iterable[int] | np.ndarray) -> None:
        """Appends documents: their tokens one after another, and how many each has."""
        counts = np.asarray(lengths, dtype=np.int32)
        if int(counts.sum()) != len(tokens):
            raise ValueError(f"lengths sum to {int(counts.sum())}, but there are {len(tokens)} tokens")
        data = np.ascontiguousarray(tokens, dtype=self.dtype).data
        self._file.write(data)
        self._digest.update(data)
        self._lengths.append(counts)
        self.documents += len(counts)
        self.tokens += len(tokens)

    def close(self) -> None:
        """Forces both files to disk and gives them their names; sets ``xxh3_bin`` and ``xxh3_idx``, checksums of what was written."""
        lengths = np.concatenate(self._lengths) if self._lengths else np.zeros(0, dtype=np.int32)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._temporary, self.bin_path)
        index = index_bytes(lengths, self.dtype)
        write_whole(self.idx_path, index)
        self.xxh3_bin, self.xxh3_idx = self._digest.hexdigest(), xxhash.xxh3_128_hexdigest(index)

    def abort(self) -> None:
        """Leaves nothing behind."""
        self._file.close()
        self._temporary.unlink(missing_ok=True)

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()


class IndexedDataset:
    """Reads one pair. Opening maps the index without reading it: a shard of a billion documents opens at once.

    ``lengths`` (i32), ``pointers`` (i64, bytes) and ``documents`` (i64) are read-only arrays over the file.
    """

    def __init__(self, prefix: str | Path, bin_size: int | None = None) -> None:
        """``bin_size``: bytes of the ``.bin`` where it lies elsewhere (in object storage) and only the ``.idx`` is here."""
        self.prefix = str(prefix)
        self.bin_path, self.idx_path = paths(prefix)
        for path in (self.idx_path,) if bin_size is not None else (self.bin_path, self.idx_path):
            if not path.is_file():
                raise UserError(f"{path} does not exist; tokenize again, or copy the whole dataset folder")
        size = self.idx_path.stat().st_size
        with self.idx_path.open("rb") as file:
            head = file.read(HEADER.size)
        if len(head) < HEADER.size or not head.startswith(MAGIC):
            raise UserError(f"{self.idx_path} is not a Megatron index (its first bytes are wrong); tokenize again")
        _, version, code, n_sequences, n_documents = HEADER.unpack(head)
        if version != VERSION or code not in DTYPES:
            raise UserError(f"{self.idx_path} has version {version} and dtype code {code}, which are unknown; tokenize again")
        expected = index_size(n_sequences, n_documents)
        if size != expected:
            raise UserError(
                f"{self.idx_path} has {size} bytes instead of {expected}: it is truncated or damaged; copy it again or tokenize again"
            )
        self.dtype = np.dtype(DTYPES[code])
        mapped = np.memmap(self.idx_path, mode="r", dtype=np.uint8) if size else np.zeros(0, dtype=np.uint8)
        ends = np.cumsum([HEADER.size, 4 * n_sequences, 8 * n_sequences, 8 * n_documents])
        self.lengths: np.ndarray = mapped[ends[0] : ends[1]].view(np.int32)
        self.pointers: np.ndarray = mapped[ends[1] : ends[2]].view(np.int64)
        self.documents: np.ndarray = mapped[ends[2] : ends[3]].view(np.int64)
        self.n_tokens = int(self.pointers[-1]) // self.dtype.itemsize + int(self.lengths[-1]) if n_sequences else 0
        found = self.bin_path.stat().st_size if bin_size is None else bin_size
        if found != self.n_tokens * self.dtype.itemsize:
            raise UserError(
                f"{self.bin_path} has {found} bytes, but its index describes {self.n_tokens * self.dtype.itemsize}: it is truncated or damaged; "
                "copy it again or tokenize again"
            )
        self._file: int | None = None

    def __len__(self) -> int:
        """Documents."""
        return len(self.lengths)

    def __getitem__(self, index: int) -> np.ndarray:
        """The tokens of document ``index``."""
        return self.read(int(self.pointers[index]) // self.dtype.itemsize, int(self.lengths[index]))

    def read(self, first: int, count: int) -> np.ndarray:
        """``count`` tokens from token ``first`` of the ``.bin``, in the file's dtype."""
        data = os.pread(self.descriptor, count * self.dtype.itemsize, first * self.dtype.itemsize)
        if len(data) != count * self.dtype.itemsize:
            raise UserError(
                f"{self.bin_path} ended early at token {first + len(data) // self.dtype.itemsize}; it changed while it was read"
            )
        return np.frombuffer(data, dtype=self.dtype)

    def batches(self, tokens: int = 1 << 21) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(tokens, lengths) of consecutive whole documents, about so many tokens at a time."""
        first = 0
        while first < len(self):
            start = int(self.pointers[first])
            last = int(np.searchsorted(self.pointers, start + tokens * self.dtype.itemsize, side="left"))
            last = min(max(last, first + 1), len(self))
            lengths = np.array(self.lengths[first:last])
            yield self.read(start // self.dtype.itemsize, int(lengths.sum(dtype=np.int64))), lengths
            first = last

    @property
    def descriptor(self) -> int:
        """The ``.bin``'s file descriptor, opened at first use in this process."""
        if self._file is None:
            self._file = os.open(self.bin_path, os.O_RDONLY)
        return self._file

    def document_starts(self) -> np.ndarray:
        """First token of each document (a new array)."""
        return self.pointers // self.dtype.itemsize

    def close(self) -> None:
        """Closes the ``.bin``."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
