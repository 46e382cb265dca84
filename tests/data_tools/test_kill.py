"""kill -9 at random instants: the same command continues, and ends with the bytes of an undisturbed run."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

# The command line, with small tasks in place of large inputs.
SCRIPT = """
import data_tools.cli, data_tools.sources, data_tools.storage
data_tools.sources.SMALLEST_TASK = data_tools.sources.HASH_BLOCK = data_tools.storage.HASH_BLOCK = 1 << 17
data_tools.cli.main()
"""


def start(*arguments: object) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def run(*arguments: object) -> float:
    began = time.monotonic()
    process = start(*arguments)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    return time.monotonic() - began


def kill_and_restart(arguments: list[object], instants: list[float], group: bool) -> int:
    """Kills at each instant (the parent alone, or its workers too) and finishes at last; returns how many runs were really cut short."""
    cut = 0
    for instant in instants:
        process = start(*arguments)
        time.sleep(instant)
        cut += process.poll() is None
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL) if group else process.kill()
        process.communicate()
    run(*arguments)
    return cut


@pytest.fixture
def large(tmp_path, texts, write_jsonl) -> Path:
    return write_jsonl(tmp_path / "corpus.jsonl", texts * 8)


def command(corpus: Path, tokenizer: Path, out: Path, workers: int) -> list[object]:
    return [
        "tokenize", corpus, "--tokenizer", tokenizer, "--output", out, "--validation-fraction", "0.1", "--workers", workers, "--dedup", "exact"
    ]  # fmt: skip


@pytest.mark.parametrize("group", [True, False], ids=["all", "parent"])
def test_killed_and_restarted(tmp_path, large, tokenizers, checksums, group):
    whole = run(*command(large, tokenizers["hf"], tmp_path / "whole", 2))
    rng = random.Random(1)
    cut = kill_and_restart(command(large, tokenizers["hf"], tmp_path / "out", 2), [rng.uniform(0.3, 1) * whole for _ in range(2)], group)
    assert cut
    assert checksums(tmp_path / "out") == checksums(tmp_path / "whole")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["manifest.json", "tokenizer", "train", "validation"]
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.slow
@pytest.mark.parametrize("instant", range(20))
def test_killed_at_twenty_instants(tmp_path, large, tokenizers, checksums, instant):
    """Half the time the workers outlive their parent; another number of workers continues."""
    whole = run(*command(large, tokenizers["hf"], tmp_path / "whole", 2))
    rng = random.Random(instant)
    for workers in (1, 2, 3):
        out = tmp_path / str(workers)
        kill_and_restart(command(large, tokenizers["hf"], out, workers), [rng.uniform(0, whole) for _ in range(3)], group=instant % 2 == 0)
        assert checksums(out) == checksums(tmp_path / "whole")
