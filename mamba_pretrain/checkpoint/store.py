"""Saving checkpoints so that a kill at any instant leaves the last one whole.

Every process writes one file into a temporary folder and then a small record of it. When all records are there, rank 0 writes the manifest, forces
everything to disk, renames the folder (the instant at which the checkpoint exists), replaces ``latest`` and removes what is no longer kept.
Background threads communicate through these files only: a collective there would collide with the training's own.
"""

from __future__ import annotations

import datetime
import json
import logging
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from data_tools.errors import UserError
from mamba_pretrain.checkpoint.config import CheckpointConfig
from mamba_pretrain.checkpoint.files import staged, write_segments
from mamba_pretrain.checkpoint.portable import Segment
from mamba_pretrain.checkpoint.reading import (
    FORMAT,
    LATEST,
    MANIFEST,
    Checkpoint,
    folder_name,
    latest_step,
    list_checkpoints,
    read_manifest,
)
from mamba_pretrain.parallel.engine import Engine
from mamba_pretrain.parallel.topology import Topology

log = logging.getLogger(__name__)
POLL_SECONDS = 0.02


class SaveError(RuntimeError):
    """A checkpoint could not be saved on some process; the one before stands."""


class CheckpointStore:
    """The checkpoints of one run; every process has one and calls its methods together with the others."""

    def __init__(self, root: Path, config: CheckpointConfig, topology: Topology) -> None:
        self.root = root
        self.config = config
        self.topology = topology
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    # -- reading

    def open(self) -> Checkpoint | None:
        """The newest complete checkpoint, verified by all processes together, or None. Raises UserError when it is damaged."""
        self.wait()
        step = self._agree(latest_step(self.root) if self.topology.rank == 0 else None)
        if step is None:
            return None
        checkpoint = read_manifest(self.root / folder_name(step))
        problem = checkpoint.problem(self.topology.rank, self.topology.world_size) if self.config.verify else None
        if self._any(problem is not None):
            said = problem or "another process found a damaged file"
            raise UserError(f"{said}: the checkpoint of step {step} is damaged; remove {checkpoint.folder} to use the one before")
        return checkpoint

    # -- saving

    def save(self, engine: Engine, step: int, meta: dict[str, Any]) -> None:
        """Saves ``engine``'s state and ``meta``. With ``async_save`` returns once the state is copied; an error shows at the next call."""
        self.wait()
        temporary = self.root / f".tmp-{folder_name(step)}"
        if self.topology.rank == 0:
            for leftover in self.root.glob(".tmp-step-*"):
                shutil.rmtree(leftover)
            temporary.mkdir(parents=True)
        self._any(False)  # the folder is there before anybody writes into it
        segments = [staged(segment, pin=True) for segment in engine.state()]
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        arguments = (temporary, segments, step, {"engine": engine.name, "world_size": self.topology.world_size, "meta": meta})
        if self.config.async_save:
            self._thread = threading.Thread(target=self._guarded, args=arguments, name="checkpoint", daemon=False)
            self._thread.start()
        else:
            self._guarded(*arguments)
            self.wait()

    def wait(self) -> None:
        """Returns when the save under way is complete. Raises SaveError on every process if it failed on one."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if self._any(error is not None):
            raise SaveError(
                f"the last checkpoint could not be saved: {error or 'another process failed'}; the one before stands"
            ) from error

    def _guarded(self, temporary: Path, segments: list[Segment], step: int, description: dict[str, Any]) -> None:
        try:
            self._write(temporary, segments, step, description)
        except BaseException as error:
            self._error = error

    def _write(self, temporary: Path, segments: list[Segment], step: int, description: dict[str, Any]) -> None:
        rank = self.topology.rank
        record = write_segments(temporary / f"rank-{rank:05d}.safetensors", segments)
        write_json(temporary / f"rank-{rank:05d}.json", record.to_dict())
        if rank != 0:
            return
        records = [self._await_json(temporary / f"rank-{other:05d}.json") for other in range(self.topology.world_size)]
        date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        write_json(temporary / MANIFEST, {"format": FORMAT, "step": step, "date": date, **description, "files": records})
        publish(temporary, self.root, step)
        self._prune()

    def _await_json(self, path: Path) -> dict[str, Any]:
        deadline = time.monotonic() + self.config.timeout
        while time.monotonic() < deadline:
            try:
                return json.loads(path.read_text())
            except FileNotFoundError:
                time.sleep(POLL_SECONDS)
        raise SaveError(f"{path.name} did not appear within {self.config.timeout:g} s: that process could not write its part")

    def _prune(self) -> None:
        complete = [entry for entry in list_checkpoints(self.root) if entry.complete]
        for entry in complete[: -self.config.keep_last]:
            if self.config.keep_every is None or entry.step % self.config.keep_every:
                doomed = entry.folder.with_name(f".tmp-{entry.folder.name}-removed")
                os.replace(entry.folder, doomed)  # one rename: a removal cut short never leaves half a checkpoint under its name
                shutil.rmtree(doomed)

    # -- agreement between processes

    def _any(self, flag: bool) -> bool:
        """Whether any process says so; also a barrier."""
        if self.topology.world_size == 1:
            return flag
        value = torch.tensor([int(flag)], dtype=torch.int32)
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return bool(value.item())

    def _agree(self, value: int | None) -> int | None:
        """Rank 0's value on every process: file systems may show a rename later on other nodes."""
        if self.topology.world_size == 1:
            return value
        shared = torch.tensor([-1 if value is None else value], dtype=torch.int64)
        dist.broadcast(shared, src=0)
        return None if shared.item() < 0 else int(shared.item())


def publish(temporary: Path, root: Path, step: int) -> None:
    """Gives a complete temporary folder its name, and points ``latest`` at it."""
    final = root / folder_name(step)
    if final.exists():  # saved before, and trained again from an earlier one: the new one counts
        doomed = root / f".tmp-{folder_name(step)}-removed"
        os.replace(final, doomed)
        shutil.rmtree(doomed)
    sync_folder(temporary)
    os.replace(temporary, final)
    pointer = root / f".tmp-{LATEST}"
    pointer.write_text(f"{final.name}\n")
    os.replace(pointer, root / LATEST)
    sync_folder(root)


def write_json(path: Path, body: dict[str, Any]) -> None:
    """Writes a JSON file whole or not at all."""
    temporary = path.with_name(f".tmp-{path.name}")
    with temporary.open("w") as file:
        json.dump(body, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def sync_folder(folder: Path) -> None:
    """Forces a folder's entries to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
