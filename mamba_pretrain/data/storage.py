"""Where a dataset's bytes lie: on a file system, or behind a URL that fsspec understands."""

from __future__ import annotations

import errno
import hashlib
import os
import resource
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from data_tools.errors import UserError
from data_tools.indexed import IndexedDataset
from data_tools.manifest import FILE_NAME, Manifest


class Storage(Protocol):
    """The ``.bin`` files of a split, by number."""

    def read(self, files: Sequence[int], offsets: Sequence[int], buffers: Sequence[memoryview]) -> None:
        """Fills ``buffers[i]`` from byte ``offsets[i]`` of file ``files[i]``. Raises UserError where a file ends early."""

    def close(self) -> None:
        """Frees what is open."""


class LocalStorage:
    """Files read with ``pread``; the system is told ``ahead`` reads early what will be needed, so that a cold disk is kept busy.

    Memory-mapping would wait for one page fault after another: on a cold disk that is some fifty times slower.
    """

    def __init__(self, paths: Sequence[Path], ahead: int) -> None:
        self.paths = list(paths)
        self.ahead = ahead
        self._files = [path.open("rb", buffering=0) for path in self.paths]
        self._descriptors = [file.fileno() for file in self._files]
        for descriptor in self._descriptors:
            _advise(descriptor, 0, 0, "POSIX_FADV_RANDOM")

    def read(self, files: Sequence[int], offsets: Sequence[int], buffers: Sequence[memoryview]) -> None:
        """See ``Storage``."""
        descriptors, ahead = self._descriptors, self.ahead
        for i in range(min(ahead, len(files))):
            _advise(descriptors[files[i]], offsets[i], buffers[i].nbytes)
        for i, (file, offset, buffer) in enumerate(zip(files, offsets, buffers, strict=True)):
            if i + ahead < len(files):
                _advise(descriptors[files[i + ahead]], offsets[i + ahead], buffers[i + ahead].nbytes)
            if os.preadv(descriptors[file], [buffer], offset) != buffer.nbytes:
                raise UserError(
                    f"{self.paths[file]} ends before byte {offset + buffer.nbytes}: it changed while it was read; check it with `mamba-data verify`"
                )

    def close(self) -> None:
        """Closes the files."""
        for file in self._files:
            file.close()


def _advise(descriptor: int, offset: int, size: int, advice: str = "POSIX_FADV_WILLNEED") -> None:
    """``posix_fadvise`` where the system has it."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, offset, size, getattr(os, advice))


class RemoteStorage:
    """Objects behind URLs; all ranges of a call are fetched at once."""

    def __init__(self, filesystem: Any, paths: Sequence[str]) -> None:
        self.filesystem = filesystem
        self.paths = list(paths)

    def read(self, files: Sequence[int], offsets: Sequence[int], buffers: Sequence[memoryview]) -> None:
        """See ``Storage``."""
        ends = [offset + buffer.nbytes for offset, buffer in zip(offsets, buffers, strict=True)]
        blocks = self.filesystem.cat_ranges([self.paths[file] for file in files], list(offsets), ends)
        for file, end, block, buffer in zip(files, ends, blocks, buffers, strict=True):
            if len(block) != buffer.nbytes:
                raise UserError(f"{self.paths[file]} ends before byte {end}: the upload is incomplete; upload it again")
            buffer[:] = block

    def close(self) -> None:
        """Nothing is held open."""


class DatasetFolder:
    """A dataset folder, local or behind a URL: its manifest, its tokenizer, its indices and its token files.

    Of a remote folder the small files (manifest, tokenizer, indices) are copied to ``cache_dir`` once; tokens are read where they lie.
    """

    def __init__(self, path: str, cache_dir: str | None = None) -> None:
        self.path = path
        self.local = Path(path)
        self._filesystem: Any = None
        if "://" in path:
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

    def open(self, shards: Sequence[str], ahead: int) -> tuple[list[IndexedDataset], Storage]:
        """Indices and tokens of shards, named as in the manifest. Raises UserError for a missing or truncated file."""
        with _many_open_files(2 * len(shards), self.path):
            return self._open_local(shards, ahead) if self._filesystem is None else self._open_remote(shards)

    def _open_local(self, shards: Sequence[str], ahead: int) -> tuple[list[IndexedDataset], Storage]:
        indices = [IndexedDataset(self.local / shard) for shard in shards]
        return indices, LocalStorage([index.bin_path for index in indices], ahead)

    def _open_remote(self, shards: Sequence[str]) -> tuple[list[IndexedDataset], Storage]:
        indices = []
        for shard in shards:
            prefix = self._fetch(f"{shard}.idx").with_suffix("")
            indices.append(IndexedDataset(prefix, bin_size=self._info(f"{shard}.bin")["size"]))
        return indices, RemoteStorage(self._filesystem, [f"{self._root}/{shard}.bin" for shard in shards])

    def _connect(self, cache_dir: str | None) -> None:
        import fsspec

        try:
            self._filesystem, self._root = fsspec.core.url_to_fs(self.path.rstrip("/"))
        except (ImportError, ValueError) as error:
            raise UserError(f"{self.path} cannot be opened: {error}") from error
        name = hashlib.sha256(self.path.rstrip("/").encode()).hexdigest()[:16]
        self.local = Path(cache_dir or "~/.cache/mamba-pretrain/datasets").expanduser() / name

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
