"""The life of an output folder: claimed, filled beside its final place, and published so that it is whole or absent at every instant.

Work happens in ``OUT.partial``. ``OUT/manifest.json`` is written last: a folder without it is no dataset.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from pathlib import Path
from typing import BinaryIO

from data_tools.errors import UserError
from data_tools.manifest import FILE_NAME, SPLITS, Manifest
from data_tools.storage import make_durable

OWN_ENTRIES = (*SPLITS, "tokenizer", FILE_NAME)
TOLERATED = {"logs", "launch"}  # a batch system's files may be there before the data


def work_folder(out: Path) -> Path:
    """Where a dataset is made."""
    return out.with_name(f"{out.name}.partial")


def _check_local(out: Path) -> None:
    if re.match(r"[a-z][a-z0-9+.-]+:/", str(out)):  # a Path has one slash where a URL has two
        raise UserError(
            f"{out} is a URL, and datasets are made on a file system; choose a local --output, and upload the folder when it is whole"
        )


def _check_place(out: Path, what: str = "--output") -> None:
    """Raises UserError for what no folder can be made of: a URL, a file."""
    _check_local(out)
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; choose another {what}")


def check_free(out: Path, overwrite: bool, what: str = "--output") -> None:
    """Raises UserError when the folder holds files that would be lost, or cannot be made. A dataset may be overwritten; strangers' files never."""
    _check_place(out, what)
    held = {path.name for path in out.iterdir()} - TOLERATED if out.exists() else set()
    if not held:
        return
    strangers = held - set(OWN_ENTRIES)
    if strangers:
        raise UserError(f"{out} holds {min(strangers)!r}, which is no part of a dataset; choose another {what}")
    if not overwrite:
        raise UserError(f"{out} already holds a dataset; choose another {what} or pass --overwrite")


def check_empty(out: Path, overwrite: bool) -> None:
    """Raises UserError unless files may be written into ``out``."""
    _check_place(out)
    if out.exists() and any(out.iterdir()) and not overwrite:
        raise UserError(f"{out} already holds files; choose another --output or pass --overwrite")


def make(folder: Path) -> None:
    """Makes a folder. Raises UserError where the system refuses."""
    _check_local(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be made ({error.strerror}); choose another --output") from error


def lock(path: Path) -> BinaryIO:
    """Holds ``path`` until the file is closed or the process ends. Raises UserError when another process holds it."""
    file = path.open("wb")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise UserError(f"another process is writing {path.parent.parent}; wait for it to end") from error
    return file


def publish(work: Path, out: Path) -> None:
    """Moves a finished dataset from ``work`` to ``out``. Killed at any instant and called again, it completes.

    The old manifest goes first and the new one comes last, so that no instant shows a dataset of two kinds.
    """
    manifest = Manifest.load(work)
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(work / ".work", ignore_errors=True)
        os.replace(work, out)
        make_durable(out.parent)
        return
    (out / FILE_NAME).unlink(missing_ok=True)
    for name in (*SPLITS, "tokenizer"):
        if (work / name).exists():
            shutil.rmtree(out / name, ignore_errors=True)
            os.replace(work / name, out / name)
        elif name in SPLITS and name not in manifest.splits:
            shutil.rmtree(out / name, ignore_errors=True)
    os.replace(work / FILE_NAME, out / FILE_NAME)
    make_durable(out)
    shutil.rmtree(work)
