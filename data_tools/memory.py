"""What the C library does with freed memory. Only glibc can be asked; elsewhere nothing happens."""

from __future__ import annotations

import contextlib
import ctypes

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # mallopt's numbers of its settings
KEPT, LARGEST = 512 << 20, 64 << 20  # bytes: freed memory that is kept, and the largest piece of it


def keep_freed_memory() -> None:
    """Has this process use freed memory again. By default large arrays come from the system each time, which clears them page by page: that can
    take longer than filling them.
    """
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(TRIM_THRESHOLD, KEPT)
        library.mallopt(MMAP_THRESHOLD, LARGEST)


def give_back_memory() -> None:
    """Gives freed memory back to the system."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
