"""Files named by a path or a URL (``s3://``, ``gs://``, anything fsspec reads): size, identity, bytes, checksum."""

from __future__ import annotations

import importlib.util
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import xxhash

from data_tools.errors import UserError

HASH_BLOCK = 8 << 20  # bytes: a file's checksum is a hash over the hashes of its blocks, so that many processes can share the work
COMPRESSED = (".gz", ".zst")

if importlib.util.find_spec("isal"):
    from isal import igzip as gzip
    from isal.isal_zlib import error as deflate_error
else:  # no wheel for this processor: slower, same bytes
    import gzip  # type: ignore[no-redef]
    from zlib import error as deflate_error  # type: ignore[assignment]
READ_ERRORS: tuple[Any, ...] = (OSError, EOFError, deflate_error)  # what damaged and missing files raise


def is_url(path: str) -> bool:
    """Whether a path names an object behind fsspec instead of a local file."""
    return "://" in path


def local_path(path: str) -> str:
    """A ``file://`` URL as the plain path it is; anything else as it is."""
    return path.removeprefix("file://")


@contextmanager
def reaching(url: str) -> Iterator[None]:
    """What an object store refuses becomes a UserError; the drivers' errors have no common base."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{url} cannot be reached ({said}); check the address, the credentials and the network") from error


def connect(url: str) -> tuple[Any, str]:
    """fsspec's file system of a URL, and the path within it. Raises UserError when there is no driver for it."""
    import fsspec

    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise UserError(f"{url} cannot be opened ({error}); install the fsspec driver of its protocol, or download the file") from error


def open_raw(path: str) -> BinaryIO:
    """The file's bytes as they lie, seekable."""
    if not is_url(path):
        return open(path, "rb", buffering=1 << 20)
    filesystem, inner = connect(path)
    return cast(BinaryIO, filesystem.open(inner, "rb"))


def open_decompressed(path: str) -> BinaryIO:
    """The file's bytes, decompressed by its ending. Damaged data raise one of ``READ_ERRORS`` while reading."""
    if path.endswith(".gz"):
        return cast(BinaryIO, gzip.open(open_raw(path), "rb"))
    if path.endswith(".zst"):
        return cast(BinaryIO, io.BufferedReader(_ZstdFile(open_raw(path)), buffer_size=1 << 20))
    return open_raw(path)


class _ZstdFile(io.RawIOBase):
    """All frames of a zstd file. The library's own reader takes a file that ends within a frame for a whole one; this raises EOFError."""

    def __init__(self, file: BinaryIO) -> None:
        import zstandard

        self._file = file
        self._new = zstandard.ZstdDecompressor().decompressobj
        self._error = zstandard.ZstdError
        self._frame = self._new()
        self._begun = False
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fills ``buffer`` from the next decompressed bytes; 0 at the end of the last frame."""
        while not self._ready:
            data = b"" if not self._frame.eof else self._frame.unused_data
            if self._frame.eof:
                self._frame, self._begun = self._new(), False
            data = data or self._file.read(1 << 17)
            if not data:
                if self._begun:
                    raise EOFError("the file ends within a compressed frame")
                return 0
            self._begun = True
            try:
                self._ready = memoryview(self._frame.decompress(data))
            except self._error as error:
                raise OSError(str(error)) from error
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def close(self) -> None:
        """Closes the file below too."""
        self._file.close()
        super().close()


def size_of(path: str) -> int:
    """Bytes of a file."""
    if not is_url(path):
        return os.path.getsize(path)
    filesystem, inner = connect(path)
    with reaching(path):
        return int(filesystem.size(inner) or 0)


def stamp(path: str) -> dict[str, Any]:
    """What tells cheaply that a file changed: its size and time of change, or an object's tag."""
    if not is_url(path):
        status = os.stat(path)
        return {"size": status.st_size, "changed": status.st_mtime_ns}
    filesystem, inner = connect(path)
    with reaching(path):
        info = filesystem.info(inner)
    tags = (info.get(key) for key in ("ETag", "etag", "md5Hash", "LastModified", "mtime", "created"))
    return {"size": info.get("size"), "changed": str(next((tag for tag in tags if tag is not None), ""))}


def block_count(size: int) -> int:
    """Blocks that a checksum is made of; an empty file has one."""
    return max(1, -(-size // HASH_BLOCK))


def hash_blocks(path: str, first: int, last: int) -> list[str]:
    """xxh3 of blocks first ... last - 1 of a local file."""
    digests = []
    buffer = memoryview(bytearray(min(HASH_BLOCK, 1 << 20)))
    with open(path, "rb", buffering=0) as file:
        file.seek(first * HASH_BLOCK)
        for _ in range(first, last):
            digest, left = xxhash.xxh3_128(), HASH_BLOCK
            while left and (count := file.readinto(buffer[:left])):
                digest.update(buffer[:count])
                left -= count
            digests.append(digest.hexdigest())
    return digests


def combine(blocks: list[str]) -> str:
    """A file's checksum from those of its blocks."""
    return blocks[0] if len(blocks) == 1 else xxhash.xxh3_128_hexdigest("".join(blocks).encode())


def file_hash(path: str) -> str:
    """The checksum that a manifest records for an input file."""
    return combine(hash_blocks(path, 0, block_count(os.path.getsize(path))))


def make_durable(folder: Path) -> None:
    """Forces a folder's names to disk, so that a renamed file survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file whole or not at all, and durably."""
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    make_durable(path.parent)
