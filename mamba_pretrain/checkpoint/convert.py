"""Checkpoints made without an engine: imported weights as the start of a run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

from mamba_pretrain.checkpoint.files import write_segments
from mamba_pretrain.checkpoint.reading import FORMAT, MANIFEST, folder_name
from mamba_pretrain.checkpoint.store import publish, write_json
from mamba_pretrain.parallel.portable import Segment


def write_weights(folder: Path, weights: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """Writes ``weights`` as the checkpoint of step 0 under ``folder/checkpoints``; ``train.init_from`` takes the folder."""
    root = folder / "checkpoints"
    temporary = root / f".tmp-{folder_name(0)}"
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir(parents=True)
    segments = [
        Segment(f"model.{name}", tuple(t.shape), 0, t.detach().float().cpu().reshape(-1).contiguous()) for name, t in weights.items()
    ]
    record = write_segments(temporary / "rank-00000.safetensors", segments)
    manifest = {"format": FORMAT, "step": 0, "date": "", "engine": "import", "world_size": 1, "meta": {"tokens": 0, **meta}}
    write_json(temporary / MANIFEST, {**manifest, "files": [record.to_dict()]})
    publish(temporary, root, 0)
