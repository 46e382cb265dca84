"""What a task reads: pieces of inputs that can be worked on apart."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from data_tools.storage import stamp


@dataclass(frozen=True)
class Part:
    """A piece of an input: of a JSONL file bytes ``begin`` ... ``end``, of a Parquet file those row groups, of a ``datasets`` dataset shard
    ``begin`` of ``end``. ``end`` -1 is the end. ``blocks`` are the blocks whose checksum goes with this part (see ``storage.HASH_BLOCK``).
    """

    path: str
    kind: str  # text | jsonl | parquet | arrow | dataset
    size: int
    begin: int = 0
    end: int = -1
    blocks: tuple[int, int] = (0, 0)

    def identity(self) -> dict[str, Any]:
        """Plain data that changes when the part or its file changes."""
        return {**asdict(self), **({} if self.kind == "dataset" else stamp(self.path))}


Task = list[Part]
