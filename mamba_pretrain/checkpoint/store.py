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
from mamba_pretrain.checkpoint.files import FileRecord, write_segments
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
from mamba_pretrain.checkpoint.remote import RemoteFolder
from mamba_pretrain.checkpoint.staging import StagedCopy, StagingBuffers
from mamba_pretrain.parallel.engine import Engine
from mamba_pretrain.parallel.topology import Topology

log = logging.getLogger(__name__)
POLL_SECONDS = 0.02
VISIBLE_SECONDS = 60.0  # a network file system may show a file later on other nodes


class SaveError(RuntimeError):
    """A checkpoint could not be saved on some process; the one before stands."""


class CheckpointStore:
    """The checkpoints of one run; every process has one and calls its methods together with the others."""

    def __init__(self, root: Path, config: CheckpointConfig, topology: Topology) -> None:
        self.root = root
        self.config = config
        self.topology = topology
        self.remote = RemoteFolder(config.remote) if config.remote else None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._buffers = StagingBuffers()

    # -- reading

    def open(self) -> Checkpoint | None:
        """The newest complete checkpoint, verified by all processes together, or None. Raises UserError when it is damaged."""
        self.wait()
        step = self._agree(latest_step(self.root) if self.topology.rank == 0 else None)
        if step is None:
            step = self._fetch()
        if step is None:
            return None
        await_file(self.root / folder_name(step) / MANIFEST, VISIBLE_SECONDS)
        checkpoint = read_manifest(self.root / folder_name(step))
        problem = checkpoint.problem(self.topology.rank, self.topology.world_size) if self.config.verify else None
        if self._any(problem is not None):
            said = problem or "another process found a damaged file"
            raise UserError(f"{said}: the checkpoint of step {step} is damaged; remove {checkpoint.folder} to use the one before")
        return checkpoint

    def _fetch(self) -> int | None:
        """Brings the remote folder's newest checkpoint here, each process a part of its files; returns its step, or None."""
        if self.remote is None:
            return None
        steps = self.remote.steps() if self.topology.rank == 0 else []
        step = self._agree(steps[-1] if steps else None)
        if step is None:
            return None
        manifest = self.remote.manifest(step)
        temporary = self.root / f".tmp-{folder_name(step)}"
        temporary.mkdir(parents=True, exist_ok=True)
        records = [FileRecord.from_dict(record) for record in manifest["files"]]
        self.remote.get(step, records[self.topology.rank :: self.topology.world_size], temporary)
        self._any(False)
        if self.topology.rank == 0:
            write_json(temporary / MANIFEST, manifest)
            publish(temporary, self.root, step)
            log.info("fetched the checkpoint of step %d from %s", step, self.remote.url)
        return self._agree(step)

    # -- saving

    def save(self, engine: Engine, step: int, meta: dict[str, Any]) -> None:
        """Saves ``engine``'s state and ``meta``. With ``async_save`` returns at once; the next update waits until the state is copied.

        Raises SaveError on every process when the save before it failed on one, or when this one cannot begin.
        """
        error = self._finish()
        temporary = self.root / f".tmp-{folder_name(step)}"
        if self.topology.rank == 0 and error is None:
            error = self._clear(temporary)
        # Also a barrier: leftovers are gone before anybody writes.
        if self._any(error is not None):
            raise _save_error(error)
        temporary.mkdir(parents=True, exist_ok=True)
        copy = self._buffers.begin(list(engine.state()))
        engine.before_update = copy.before_update
        arguments = (temporary, copy, step, {"engine": engine.name, "world_size": self.topology.world_size, "meta": meta})
        # A daemon, so that a process that fails is not held by a save whose peers are gone; `wait` is what normally ends it.
        self._thread = threading.Thread(target=self._guarded, args=arguments, name="checkpoint", daemon=True)
        self._thread.start()
        if not self.config.async_save:
            self.wait()
            self._any(False)

    def wait(self, seconds: float | None = None) -> None:
        """Returns when this process's part of the save under way is done (rank 0's: the whole checkpoint).

        Communicates with nobody, so that a process that failed may call it too; such a one should give ``seconds``, since its peers may never
        finish. Raises SaveError if the save failed here.
        """
        error = self._finish(seconds)
        if error is not None:
            raise _save_error(error)

    def _finish(self, seconds: float | None = None) -> BaseException | None:
        if self._thread is not None:
            self._thread.join(seconds)
            if self._thread.is_alive():
                return SaveError(f"the save under way did not finish within {seconds:g} s")
            self._thread = None
        error, self._error = self._error, None
        return error

    def _clear(self, temporary: Path) -> BaseException | None:
        """Removes what interrupted saves left and creates the folder of this one."""
        try:
            for leftover in self.root.glob(".tmp-step-*"):
                shutil.rmtree(leftover)
            temporary.mkdir(parents=True)
        except OSError as error:
            return error
        return None

    def _guarded(self, temporary: Path, copy: StagedCopy, step: int, description: dict[str, Any]) -> None:
        try:
            self._write(temporary, copy, step, description)
        except BaseException as error:
            self._error = error

    def _write(self, temporary: Path, copy: StagedCopy, step: int, description: dict[str, Any]) -> None:
        rank = self.topology.rank
        path = temporary / f"rank-{rank:05d}.safetensors"
        record = write_segments(path, copy.finish())
        copied = self._copy(step, path)
        write_json(temporary / f"rank-{rank:05d}.json", {"file": record.to_dict(), "copied": copied})
        if rank != 0:
            return
        parts = [temporary / f"rank-{other:05d}.json" for other in range(self.topology.world_size)]
        reports = [json.loads(await_file(part, self.config.timeout).read_text()) for part in parts]
        for part in parts:
            part.unlink()
        date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        files = [report["file"] for report in reports]
        write_json(temporary / MANIFEST, {"format": FORMAT, "step": step, "date": date, **description, "files": files})
        publish(temporary, self.root, step)
        self._prune()
        if all(report["copied"] for report in reports):
            self._copy(step, self.root / folder_name(step) / MANIFEST)
            self._prune_remote()

    def _copy(self, step: int, path: Path) -> bool:
        """Copies a file to the remote folder. A failure is logged only: the run has its own checkpoint, and the next save tries again."""
        if self.remote is None:
            return False
        try:
            self.remote.put(step, path)
        except Exception as error:
            log.warning("checkpoint of step %d: %s was not copied to %s: %s", step, path.name, self.remote.url, error)
            return False
        return True

    def _doomed(self, steps: list[int]) -> list[int]:
        every = self.config.keep_every
        return [step for step in steps[: -self.config.keep_last] if every is None or step % every]

    def _prune(self) -> None:
        for step in self._doomed([entry.step for entry in list_checkpoints(self.root) if entry.complete]):
            discard(self.root, step)

    def _prune_remote(self) -> None:
        if self.remote is None:
            return
        try:
            for step in self._doomed(self.remote.steps()):
                self.remote.remove(step)
        except Exception as error:
            log.warning("old checkpoints in %s were not removed: %s", self.remote.url, error)

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


def _save_error(error: BaseException | None) -> SaveError:
    failure = SaveError(f"a checkpoint could not be saved: {error or 'another process failed'}; the one before stands")
    failure.__cause__ = error
    return failure


def await_file(path: Path, seconds: float) -> Path:
    """``path``, once it exists. Raises SaveError when it does not appear in time."""
    deadline = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > deadline:
            raise SaveError(f"{path} did not appear within {seconds:g} s: the process that writes it failed, or the file system is slow")
        time.sleep(POLL_SECONDS)
    return path


def discard(root: Path, step: int) -> None:
    """Removes a checkpoint. One rename comes first: a removal cut short never leaves half a checkpoint under its name."""
    doomed = root / f".tmp-{folder_name(step)}-removed"
    if doomed.exists():
        shutil.rmtree(doomed)
    os.replace(root / folder_name(step), doomed)
    shutil.rmtree(doomed)


def publish(temporary: Path, root: Path, step: int) -> None:
    """Gives a complete temporary folder its name, and points ``latest`` at it."""
    final = root / folder_name(step)
    if final.exists():  # saved before, and trained again from an earlier one: the new one counts
        discard(root, step)
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
