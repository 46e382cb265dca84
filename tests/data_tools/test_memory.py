"""Freed memory is used again where that is asked for."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

# Page faults while arrays of 8 MB come and go, in a thread as in a loader.
SCRIPT = """
import resource, sys, threading
import numpy as np
from data_tools.memory import give_back_memory, keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
def work():
    for _ in range(40):
        arrays = [np.ones(1 << 20) for _ in range(3)]
thread = threading.Thread(target=work)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
thread.start()
thread.join()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
give_back_memory()
"""


def faults(how: str) -> int:
    return int(subprocess.run([sys.executable, "-c", SCRIPT, how], check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator can be asked")
def test_large_arrays_are_not_mapped_anew_each_time():
    assert faults("keep") * 4 < faults("leave")
