"""Runs the parity checks in a process of its own: a kernel that hangs, crashes or leaves the GPU unusable costs one line, not the examination.

The process writes one JSON line to a pipe before each case and one after it. A case that is late or takes the process down is reported, and
another process goes on behind it.
"""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from mamba_pretrain.doctor.check import Begun, Check, red
from mamba_pretrain.ops.config import OpsConfig

COMMAND = [sys.executable, "-m", __name__]
START_LIMIT = 180.0  # seconds to import torch from a slow disk and to open the GPU
CASE_LIMIT = 60.0  # seconds for one implementation, its compilation included
SERVING = "ops of the run"
MEND_LATE = "run doctor again (what was compiled is kept, so it is quicker); if it hangs again, set ops.require to another implementation"
MEND_CRASH = "set ops.require to another implementation of this op, and reinstall the package that provides this one"


@dataclass(frozen=True)
class Wanted:
    """What to check. ``ops``: those of the run's model, or None where no run is known; ``skip``: implementations that are done."""

    device: str
    ops: Sequence[str] | None
    require: str | dict[str, str]
    allow_slow: bool
    isolate_documents: bool
    skip: int = 0


def parity_apart(wanted: Wanted, case_limit: float = CASE_LIMIT, start_limit: float = START_LIMIT) -> Iterator[Check | Begun]:
    """The lines of ``parity`` and ``serving``, whatever happens while they are found."""
    done = 0  # implementations that were begun; what made a process end is not tried again
    while True:
        with _Process(replace(wanted, skip=done)) as process:
            begun, waiting = 0, "parity"
            while (line := process.line(case_limit if begun else start_limit)) is not None:
                if "done" in line:
                    return
                if "begun" in line:
                    begun, waiting = begun + 1, line["begun"]
                    yield Begun(waiting)
                else:
                    waiting = ""
                    yield Check(**line["check"])
            if waiting:
                yield process.verdict(waiting, case_limit if begun else start_limit)
            if not begun or waiting == SERVING:
                return  # it would end there again
            done += begun


class _Process:
    """The checking process and the pipe it writes to."""

    def __init__(self, wanted: Wanted) -> None:
        reading, writing = os.pipe()
        self._pipe, self._unread = reading, b""
        self._stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115  # closed by __exit__
        command = [*COMMAND, str(writing), json.dumps(asdict(wanted))]
        self._process = subprocess.Popen(
            command, pass_fds=[writing], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=self._stderr
        )
        os.close(writing)
        self._late = False

    def __enter__(self) -> _Process:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._pipe)
        self._stderr.close()

    def line(self, limit: float) -> dict[str, Any] | None:
        """The next line; None if there is none within ``limit`` seconds or the process ended."""
        deadline = time.monotonic() + limit
        with selectors.DefaultSelector() as selector:
            selector.register(self._pipe, selectors.EVENT_READ)
            while b"\n" not in self._unread:
                self._late = not selector.select(max(0.0, deadline - time.monotonic()))
                if self._late or not (read := os.read(self._pipe, 1 << 16)):
                    return None
                self._unread += read
        text, _, self._unread = self._unread.partition(b"\n")
        return json.loads(text)

    def verdict(self, name: str, limit: float) -> Check:
        """Why no line came."""
        if self._late:
            return red(name, f"did not finish within {limit:g} s", MEND_LATE)
        code = self._process.wait()
        self._stderr.seek(0)
        last = (self._stderr.read().strip().splitlines() or [""])[-1][:200]
        how = f"killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        return red(name, f"took its process down ({how}): {last}", MEND_CRASH)


def use_one_configuration_per_kernel() -> None:
    """Keeps Triton from timing a dozen variants of each of mamba_ssm's kernels, minutes on a cold cache: whether a kernel is right and loads
    shows with the smallest of them. To be called before the kernels are imported."""
    try:
        import triton
    except ImportError:
        return
    original = triton.autotune

    def smallest(configs: Any, *args: Any, **kwargs: Any) -> Any:
        def work(config: Any) -> int:
            size = max(1, config.num_stages) * max(1, config.num_warps)
            for value in config.kwargs.values():
                size *= value if isinstance(value, int) and value > 0 else 1
            return size

        return original([min(configs, key=work)], *args, **kwargs)

    triton.autotune = smallest


def main(pipe: int, wanted: Wanted) -> None:
    """The process: every case, one after another."""
    import torch

    from mamba_pretrain.doctor.parity import parity, serving

    use_one_configuration_per_kernel()
    device = torch.device(wanted.device)
    with os.fdopen(pipe, "w", buffering=1) as lines:

        def write(line: dict[str, Any]) -> None:
            lines.write(json.dumps(line) + "\n")

        for finding in parity(device, wanted.skip):
            write({"begun": finding.name} if isinstance(finding, Begun) else {"check": asdict(finding)})
            if isinstance(finding, Check) and finding.status == "red" and device.type == "cuda":
                torch.cuda.synchronize()  # after an illegal access nothing works in this process: let another go on
        write({"begun": SERVING})
        config = OpsConfig(require=wanted.require, allow_slow=wanted.allow_slow)
        for check in serving(wanted.ops, config, device, wanted.isolate_documents):
            write({"check": asdict(check)})
        write({"done": True})


if __name__ == "__main__":
    main(int(sys.argv[1]), Wanted(**json.loads(sys.argv[2])))
