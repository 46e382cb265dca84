"""Numbers that Python and a kernel's source both hold: were they unequal, buffers would be too small and results silently wrong."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mamba_pretrain import ops
from mamba_pretrain.ops import c_conv, c_norm, c_scan, c_ssd, cc, cuda_conv_kernels, cuda_scan_kernels
from mamba_pretrain.optim import cuda_adamw

FOLDER = Path(ops.__file__).parent


def constants(*files: str) -> dict[str, int]:
    """What ``enum { A = 1, B = A * 2 }`` and ``constexpr int A = 1;`` define at the left margin, in order."""
    found: dict[str, int] = {}
    for file in files:
        for line in (FOLDER / file).read_text().splitlines():
            if re.match(r"enum \{|constexpr int ", line):
                for name, value in re.findall(r"\b([A-Z_]+) = ([^,;}]+)", line):
                    if re.fullmatch(r"[A-Z_\d\s*/+<]+", value) and all(word in found for word in re.findall(r"[A-Z_]+", value)):
                        found[name] = eval(value.replace("/", "//"), {}, found)
    return found


@pytest.mark.parametrize(
    ("files", "name", "python"),
    [
        (("c_src/lanes.h", "c_src/ssd_scan.c"), "KEEP", c_ssd.KEEP),
        (("c_src/lanes.h", "c_src/ssd_scan.c"), "HEADS", c_ssd.TASK_HEADS),
        (("c_src/lanes.h", "c_src/ssd_scan.c"), "WIDTH", c_ssd.BLOCK),
        (("c_src/lanes.h", "c_src/ssd_scan.c"), "ROWS", c_ssd.ROWS),
        (("c_src/selective_scan.c",), "CHUNK", c_scan.CHUNK),
        (("c_src/selective_scan.c",), "MAX_STATES", c_scan.MAX_STATES),
        (("c_src/causal_conv1d.c",), "MAX_TAPS", c_conv.MAX_TAPS),
        (("c_src/rms_norm.c",), "ROWS", c_norm.TASK_ROWS),
        (("cuda_src/scan.cuh",), "TILE", cuda_scan_kernels.TILE),
        (("cuda_src/conv_reduce.cu",), "WARPS_A_BLOCK", cuda_conv_kernels.REDUCE_BLOCK // 32),
        (("cuda_src/adamw.cu",), "THREADS", cuda_adamw.THREADS),
        (("cuda_src/adamw.cu",), "CHUNK", cuda_adamw.CHUNK),
    ],
)
def test_python_and_the_source_agree(files, name, python):
    assert constants(*files)[name] == python


def test_a_group_of_channels_is_what_python_counts_with():
    source = constants("c_src/lanes.h", "c_src/groups.h")
    assert source["GROUP"] * source["LANES"] == cc.TASK_CHANNELS
