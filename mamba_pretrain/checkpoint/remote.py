"""Copies of checkpoints in a remote folder (object store, another file system) that fsspec can reach.

Object stores cannot rename, so a copy is complete when its manifest is there: it is written last and removed first.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from data_tools.errors import UserError
from mamba_pretrain.checkpoint.files import FileRecord
from mamba_pretrain.checkpoint.reading import MANIFEST, folder_name


class RemoteFolder:
    """Checkpoints under an fsspec URL such as ``s3://bucket/runs/NAME`` or ``file:///backup/NAME``."""

    def __init__(self, url: str) -> None:
        import fsspec

        self.url = url
        try:
            self._fs, self._root = fsspec.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise UserError(f"checkpoint.remote={url} cannot be reached: {error}") from error

    def _path(self, step: int, name: str = "") -> str:
        return f"{self._root}/{folder_name(step)}" + (f"/{name}" if name else "")

    def steps(self) -> list[int]:
        """Steps of the complete copies, ascending."""
        self._fs.invalidate_cache()
        if not self._fs.exists(self._root):
            return []
        names = (re.fullmatch(r"step-(\d{8,})", path.rstrip("/").rpartition("/")[2]) for path in self._fs.ls(self._root, detail=False))
        return sorted(step for step in (int(name[1]) for name in names if name) if self._fs.exists(self._path(step, MANIFEST)))

    def put(self, step: int, file: Path) -> None:
        """Copies a file there."""
        self._fs.makedirs(self._path(step), exist_ok=True)
        self._fs.put_file(str(file), self._path(step, file.name))

    def manifest(self, step: int) -> dict[str, Any]:
        """The manifest of a complete copy."""
        return json.loads(self._fs.cat_file(self._path(step, MANIFEST)))

    def get(self, step: int, records: list[FileRecord], folder: Path) -> None:
        """Copies the files of ``records`` into ``folder``."""
        for record in records:
            self._fs.get_file(self._path(step, record.file), str(folder / record.file))

    def remove(self, step: int) -> None:
        """Removes a copy, complete or not."""
        if self._fs.exists(self._path(step, MANIFEST)):
            self._fs.rm_file(self._path(step, MANIFEST))
        if self._fs.exists(self._path(step)):
            self._fs.rm(self._path(step), recursive=True)
