"""Text from a pipe: kept in a file while it is tokenized, so that all workers can share it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import xxhash

from data_tools import folders
from data_tools.errors import UserError


@contextmanager
def kept(sources: Sequence[str], output: Path, stream: BinaryIO) -> Iterator[list[str]]:
    """The sources, with ``-`` replaced by ``OUTPUT.stdin.jsonl``, which holds the stream's bytes and is gone when all is done.

    Raises UserError when the stream is empty or ``-`` is named twice.
    """
    if "-" not in sources:
        yield list(sources)
        return
    if list(sources).count("-") > 1:
        raise UserError("stdin is named twice; give - once")
    path = output.with_name(f"{output.name}.stdin.jsonl")
    folders.make(path.parent)
    try:
        digest = xxhash.xxh3_64()
        with path.open("wb") as file:
            while block := stream.read(1 << 20):
                file.write(block)
                digest.update(block)
        if not path.stat().st_size:
            raise UserError("stdin is empty; pipe JSONL into it")
        # Its time stands for its contents: after an interruption the same stream is known again, and finished shards stay.
        moment = digest.intdigest() >> 4
        os.utime(path, ns=(moment, moment))
        yield [str(path) if source == "-" else source for source in sources]
    finally:
        path.unlink(missing_ok=True)
