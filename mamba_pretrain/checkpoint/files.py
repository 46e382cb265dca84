"""One process's file of a checkpoint: flat fp32 pieces in the safetensors format, written and hashed in one pass."""

from __future__ import annotations

import json
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from mamba_pretrain.parallel.portable import Segment


@dataclass(frozen=True)
class Piece:
    """Where a range of a tensor lies: ``length`` elements from element ``offset`` of tensor ``name``, at byte ``position`` of a file."""

    name: str
    offset: int
    length: int
    position: int


@dataclass(frozen=True)
class FileRecord:
    """A written file: size in bytes, xxh3-128, its pieces, and the shapes of the tensors they belong to."""

    file: str
    size: int
    xxh3: str
    pieces: list[Piece]
    shapes: dict[str, tuple[int, ...]]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        rows = [[p.name, p.offset, p.length, p.position] for p in self.pieces]
        return {
            "file": self.file,
            "size": self.size,
            "xxh3": self.xxh3,
            "pieces": rows,
            "shapes": {k: list(v) for k, v in self.shapes.items()},
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> FileRecord:
        """The record written by ``to_dict``."""
        shapes = {name: tuple(shape) for name, shape in data["shapes"].items()}
        return cls(data["file"], data["size"], data["xxh3"], [Piece(*row) for row in data["pieces"]], shapes)


def write_segments(path: Path, segments: list[Segment]) -> FileRecord:
    """Writes the segments (on the CPU) as a safetensors file, keys ``NAME@OFFSET``, forces it to disk, and returns its record."""
    header: dict[str, Any] = {}
    end = 0
    for segment in segments:
        size = 4 * segment.data.numel()
        header[f"{segment.name}@{segment.offset}"] = {"dtype": "F32", "shape": [segment.data.numel()], "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format asks for aligned data
    digest = xxhash.xxh3_128()
    begin = 8 + len(text)
    blocks: list[Any] = [struct.pack("<Q", len(text)), text, *(s.data.numpy().view(np.uint8) for s in segments)]
    with path.open("wb") as file:
        for block in blocks:
            file.write(block)
            digest.update(block)
        file.flush()
        os.fsync(file.fileno())
    ends = np.cumsum([0] + [4 * s.data.numel() for s in segments]) + begin
    pieces = [Piece(s.name, s.offset, s.data.numel(), int(position)) for s, position in zip(segments, ends[:-1], strict=True)]
    return FileRecord(path.name, int(ends[-1]), digest.hexdigest(), pieces, {s.name: s.shape for s in segments})


def checksum(path: Path) -> str:
    """xxh3-128 of a file."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
