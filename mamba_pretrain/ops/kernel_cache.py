"""Where compiled kernels are kept between processes."""

from __future__ import annotations

import os
from pathlib import Path

VARIABLE = "MAMBA_PRETRAIN_KERNEL_CACHE"


def cache_folder() -> Path:
    """``$MAMBA_PRETRAIN_KERNEL_CACHE``, else a folder in the user's cache; best on a local disk."""
    if chosen := os.environ.get(VARIABLE):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mamba_pretrain" / "kernels"
