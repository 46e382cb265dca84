"""Where a dataset's bytes lie: on a file system, or behind a URL that fsspec understands."""

from __future__ import annotations

import errno
import hashlib
import os
import resource
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from data_tools.errors import UserError
from data_tools.indexed import IndexedDataset
from data_tools.manifest import FILE_NAME, Manifest
from data_tools.storage import connect, is_url, local_path, reaching

ADVISES = hasattr(os, "posix_fadvise")  # not on macOS


@dataclass(frozen=True)
class Reads:
    """Ranges of bytes to read: ``size[i]`` from byte ``offset[i]`` of file ``file[i]``, to byte ``place[i]`` of a buffer."""

    file: list[int]
    offset: list[int]
    size: list[int]
    place: list[int]


class Storage(Protocol):
    """The ``.bin`` files of a split, by number."""

    def expect(self, reads: Reads) -> None:
        """Announces what will be read soon, so that it is on its way by then. Returns at once."""

    def read(self, reads: Reads, buffer: memoryview) -> None:
        """Fills the buffer (bytes). Raises UserError where a file ends early."""

    def close(self) -> None:
        """Frees what is open."""


class LocalStorage:
    """Files read with ``pread``. The system is told what is expected, and reads it meanwhile: as many reads as are announced keep the disk busy.

    Memory-mapping would wait for one page fault after another, and by default read much around each.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = list(paths)
        self._files = [path.open("rb", buffering=0) for path in self.paths]
        self._descriptors = [file.fileno() for file in self._files]
        if ADVISES:
            for descriptor in self._descriptors:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)

    def expect(self, reads: Reads) -> None:
        """See ``Storage``."""
        if ADVISES:
            descriptors, advise, needed = self._descriptors, os.posix_fadvise, os.POSIX_FADV_WILLNEED
            for file, offset, size in zip(reads.file, reads.offset, reads.size, strict=True):
                advise(descriptors[file], offset, size, needed)

    def read(self, reads: Reads, buffer: memoryview) -> None:
        """See ``Storage``."""
        descriptors, pread = self._descriptors, os.preadv
        for file, offset, size, place in zip(reads.file, reads.offset, reads.size, reads.place, strict=True):
            if pread(descriptors[file], [buffer[place : place + size]], offset) != size:
                raise UserError(
                    f"{self.paths[file]} ends before byte {offset + size}: it changed while it was read; check it with `mamba-data verify`"
                )

    def close(self) -> None:
        """Closes the files."""
        for file in self._files:
            file.close()


class RemoteStorage:
    """Objects behind URLs; all ranges of a call are fetched at once."""

    def __init__(self, filesystem: Any, paths: Sequence[str]) -> None:
        self.filesystem = filesystem
        self.paths = list(paths)

    def expect(self, reads: Reads) -> None:
        """Nothing: ``data.workers`` threads fetch several groups at once instead."""

    def read(self, reads: Reads, buffer: memoryview) -> None:
        """See ``Storage``."""
        ends = [offset + size for offset, size in zip(reads.offset, reads.size, strict=True)]
        blocks = self.filesystem.cat_ranges([self.paths[file] for file in reads.file], reads.offset, ends)
        for file, end, size, place, block in zip(reads.file, ends, reads.size, reads.place, blocks, strict=True):
            if len(block) != size:
                raise UserError(f"{self.paths[file]} ends before byte {end}: the upload is incomplete; upload it again")
            buffer[place : place + size] = block

    def close(self) -> None:
        """Nothing is held open."""


class DatasetFolder:
    """A dataset folder, local or behind a URL: its manifest, its tokenizer, its indices and its token files.

    Of a remote folder the small files (manifest, tokenizer, indices) are copied to ``cache_dir`` once; tokens are read where they lie.
    """

    def __init__(self, path: str, cache_dir: str | None = None) -> None:
        self.path = local_path(path)
        self.local = Path(self.path)
        self._filesystem: Any = None
        if is_url(self.path):
            self._connect(cache_dir)
        self.manifest = Manifest.load(self.local if self._filesystem is None else self._fetch(FILE_NAME, always=True).parent)
        if self._filesystem is not None:
            self.local /= self.manifest.fingerprint  # a dataset that was made anew never meets files of the old one

    @property
    def tokenizer_dir(self) -> Path:
        """The tokenizer's files (copied here if the dataset is remote)."""
        if self._filesystem is not None:
            for name in self.manifest.tokenizer.files:
                self._fetch(f"tokenizer/{name}")
        return self.local / "tokenizer"

    def open(self, shards: Sequence[str]) -> tuple[list[IndexedDataset], Storage]:
        """Indices and tokens of shards, named as in the manifest. Raises UserError for a missing or truncated file."""
        with _many_open_files(2 * len(shards), self.path):
            return self._open_local(shards) if self._filesystem is None else self._open_remote(shards)

    def _open_local(self, shards: Sequence[str]) -> tuple[list[IndexedDataset], Storage]:
        indices = [IndexedDataset(self.local / shard) for shard in shards]
        return indices, LocalStorage([index.bin_path for index in indices])

    def _open_remote(self, shards: Sequence[str]) -> tuple[list[IndexedDataset], Storage]:
        indices = []
        for shard in shards:
            prefix = self._fetch(f"{shard}.idx").with_suffix("")
            indices.append(IndexedDataset(prefix, bin_size=self._info(f"{shard}.bin")["size"]))
        return indices, RemoteStorage(self._filesystem, [f"{self._root}/{shard}.bin" for shard in shards])

    def _connect(self, cache_dir: str | None) -> None:
        address = self.path.rstrip("/")
        self._filesystem, self._root = connect(address)
        self.local = Path(cache_dir or "~/.cache/mamba-pretrain/datasets").expanduser() / hashlib.sha256(address.encode()).hexdigest()[:16]

    def _fetch(self, name: str, always: bool = False) -> Path:
        """The local copy of a small remote file; several processes may ask at once."""
        target = self.local / name
        target.parent.mkdir(parents=True, exist_ok=True)
        size = self._info(name)["size"]
        if always or not target.is_file() or target.stat().st_size != size:
            temporary = target.with_name(f".tmp-{os.getpid()}-{target.name}")
            self._filesystem.get_file(f"{self._root}/{name}", str(temporary))
            os.replace(temporary, target)
        return target

    def _info(self, name: str) -> dict[str, Any]:
        with reaching(f"{self.path}/{name}"):
            try:
                return self._filesystem.info(f"{self._root}/{name}")
            except FileNotFoundError as error:
                raise UserError(f"{self.path}/{name} does not exist; upload the whole dataset folder of `mamba-data tokenize`") from error


@contextmanager
def _many_open_files(count: int, place: str) -> Iterator[None]:
    """Raises this process's limit of open files by ``count`` as far as the system allows; UserError if that does not suffice."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + len(os.listdir("/dev/fd")) + 256
    if soft != resource.RLIM_INFINITY and wanted > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))
    try:
        yield
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
        raise UserError(
            f"{place} has {count // 2} shards, more files than this system lets a process open; raise the hard limit (`ulimit -Hn`) or tokenize "
            "into fewer shards"
        ) from error
