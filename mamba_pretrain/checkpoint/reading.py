"""Finding, listing, verifying and reading checkpoints."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_tools.errors import UserError
from mamba_pretrain.checkpoint.files import FileRecord, checksum
from mamba_pretrain.parallel.portable import whole

MANIFEST = "manifest.json"
LATEST = "latest"
FORMAT = 1
_STEP = re.compile(r"step-(\d{8,})")


def folder_name(step: int) -> str:
    """The folder of a step's checkpoint."""
    return f"step-{step:08d}"


@dataclass
class FileReader:
    """Serves ranges of tensors from a checkpoint's files, mapped into memory at first use."""

    folder: Path
    records: list[FileRecord]
    _maps: dict[str, np.memmap] = field(default_factory=dict)

    @property
    def source(self) -> str:
        """Where the data comes from, for messages."""
        return str(self.folder)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's shape."""
        return self._shapes

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: shape for record in self.records for name, shape in record.shapes.items()}

    @cached_property
    def _places(self) -> dict[str, list[tuple[int, int, str, int]]]:
        """Per tensor: (offset, length, file, byte position), by offset."""
        places: dict[str, list[tuple[int, int, str, int]]] = {}
        for record in self.records:
            for piece in record.pieces:
                places.setdefault(piece.name, []).append((piece.offset, piece.length, record.file, piece.position))
        return {name: sorted(found) for name, found in places.items()}

    def read(self, name: str, offset: int, length: int) -> Tensor:
        """Elements [offset, offset + length) of a tensor. Raises UserError if the files do not cover them."""
        out = np.empty(length, dtype=np.float32)
        covered = 0
        for start, count, file, position in self._places.get(name, []):
            first, end = max(start, offset), min(start + count, offset + length)
            if first < end:
                at = position + 4 * (first - start)
                out[first - offset : end - offset] = self._map(file)[at : at + 4 * (end - first)].view(np.float32)
                covered += end - first
        if covered != length:
            raise UserError(f"{self.folder} holds {covered} of {length} elements of {name}; the checkpoint is damaged, use an earlier one")
        return torch.from_numpy(out)

    def _map(self, file: str) -> np.memmap:
        if file not in self._maps:
            self._maps[file] = np.memmap(self.folder / file, mode="r", dtype=np.uint8)
        return self._maps[file]


@dataclass
class Checkpoint:
    """A complete checkpoint."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        """The step it was saved after."""
        return self.manifest["step"]

    @property
    def meta(self) -> dict[str, Any]:
        """What the training loop stored beside the tensors."""
        return self.manifest["meta"]

    @cached_property
    def reader(self) -> FileReader:
        """Its tensors."""
        return FileReader(self.folder, self.records)

    @cached_property
    def records(self) -> list[FileRecord]:
        """Its files."""
        return [FileRecord.from_dict(record) for record in self.manifest["files"]]

    def full_model(self) -> dict[str, Tensor]:
        """All fp32 weights by name."""
        names = [name for name in self.reader.shapes() if name.startswith("model.")]
        return {name.removeprefix("model."): whole(self.reader, name) for name in names}

    def problem(self, part: int = 0, of: int = 1) -> str | None:
        """What is wrong with every ``of``-th file from ``part``: missing, of another size, or with another checksum; None if nothing is."""
        for record in self.records[part::of]:
            path = self.folder / record.file
            if not path.is_file():
                return f"{path} is missing"
            if path.stat().st_size != record.size:
                return f"{path} has {path.stat().st_size} bytes instead of {record.size}"
            if checksum(path) != record.xxh3:
                return f"{path} has another checksum than when it was written"
        return None


@dataclass(frozen=True)
class Entry:
    """A line of the list of checkpoints."""

    step: int
    tokens: int | None
    size: int
    complete: bool
    engine: str
    world_size: int | None
    date: str
    folder: Path

    def columns(self) -> tuple[str, ...]:
        """For a table: step, tokens, size, complete, engine, world size, date."""
        tokens = "-" if self.tokens is None else f"{self.tokens:,}"
        world = "-" if self.world_size is None else str(self.world_size)
        return (str(self.step), tokens, f"{self.size / 1e6:,.1f} MB", "yes" if self.complete else "no", self.engine, world, self.date)


def list_checkpoints(root: Path) -> list[Entry]:
    """All checkpoints under ``RUN/checkpoints`` by step, unfinished ones too."""
    found = []
    for folder in sorted(root.glob("*step-*")) if root.is_dir() else []:
        match = _STEP.search(folder.name)
        if match is None or not folder.is_dir():
            continue
        size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
        complete = folder.name == match[0] and (folder / MANIFEST).is_file()
        manifest = json.loads((folder / MANIFEST).read_text()) if complete else {}
        tokens = manifest.get("meta", {}).get("tokens")
        date, engine = manifest.get("date", "-"), manifest.get("engine", "-")
        found.append(Entry(int(match[1]), tokens, size, complete, engine, manifest.get("world_size"), date, folder))
    return sorted(found, key=lambda entry: (entry.step, entry.complete))


def read_manifest(folder: Path) -> Checkpoint:
    """A checkpoint folder, opened. Raises UserError when its manifest is damaged or of another version."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}); the checkpoint is damaged, remove its folder to use the one before") from error
    if manifest.get("format") != FORMAT:
        raise UserError(f"{path} is of another version of the checkpoint format; use the release that wrote it to convert it")
    return Checkpoint(folder, manifest)


def latest_step(root: Path) -> int | None:
    """The newest complete checkpoint's step. Folders get their name by one rename, so those that have it are complete."""
    steps = [entry.step for entry in list_checkpoints(root) if entry.complete]
    return max(steps, default=None)


def open_checkpoint(path: Path, step: int | None = None) -> Checkpoint:
    """The checkpoint of ``step`` (default: the newest) in a run folder or its ``checkpoints``, or a checkpoint folder itself, verified.

    Raises UserError when there is none or a file is damaged.
    """
    if (path / MANIFEST).is_file() and _STEP.fullmatch(path.name):
        checkpoint = read_manifest(path)
    else:
        root = path if path.name == "checkpoints" else path / "checkpoints"
        chosen = latest_step(root) if step is None else step
        if chosen is None or not (root / folder_name(chosen)).is_dir():
            known = ", ".join(str(entry.step) for entry in list_checkpoints(root) if entry.complete) or "none"
            raise UserError(f"{path} holds no complete checkpoint{'' if step is None else f' of step {step}'}; there are: {known}")
        checkpoint = read_manifest(root / folder_name(chosen))
    if (problem := checkpoint.problem()) is not None:
        raise UserError(f"{problem}: the checkpoint is damaged; remove its folder to use the one before")
    return checkpoint
