"""``train.profile_steps=10-12``: a trace of those steps, and where their time went, by kind of operation."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from mamba_pretrain.monitor.text import percent

log = logging.getLogger(__name__)

# Kinds by parts of the names of a kernel, of the op that launched it and of the scopes around that, in lower case. The first kind that
# matches any of those names wins, so a matmul inside the scan counts as scan.
KINDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("communication", ("nccl", "c10d", "all_reduce", "allreduce", "all_gather", "allgather", "reduce_scatter", "gloo")),
    ("optimizer", ("optimizer", "adam", "muon", "lamb", "clip_grad")),
    ("loss", ("cross_entropy", "crossentropy", "log_softmax", "nll_loss")),
    (
        "scan",
        ("selective_scan", "selectivescan", "c_scan", "ssd", "chunk_scan", "chunk_state", "chunk_cumsum", "state_passing", "_bmm_chunk"),
    ),
    ("conv", ("causal_conv", "causalconv", "conv1d", "convolution", "conv_depthwise")),
    ("norm", ("rms_norm", "rmsnorm", "rms_norm_gated", "layer_norm", "layernorm", "_norm_fwd", "_norm_bwd")),
    ("attention", ("flash_attn", "flash_fwd", "flash_bwd", "scaled_dot_product", "fmha")),
    ("matmul", ("gemm", "matmul", "::mm", "::bmm", "addmm", "::linear", "cutlass", "nvjet", "cublas", "wgmma")),
    ("copies and casts", ("memcpy", "memset", "copy_", "_to_copy", "::to", "::cat", "convert")),
)
OTHER = "other"
TOP_KERNELS = 12


class HasRank(Protocol):
    """What the profiler asks of a topology."""

    @property
    def rank(self) -> int: ...


@dataclass
class Kernel:
    """Total microseconds and calls of one kernel (on a CPU: of one op's own time) within one kind."""

    microseconds: float = 0.0
    calls: int = 0


@dataclass
class Breakdown:
    """Time by kind and by kernel over ``steps`` steps, in microseconds."""

    steps: int
    kinds: dict[str, float] = field(default_factory=dict)
    kernels: dict[tuple[str, str], Kernel] = field(default_factory=dict)

    def add(self, kind: str, name: str, microseconds: float) -> None:
        """Counts one launch."""
        self.kinds[kind] = self.kinds.get(kind, 0.0) + microseconds
        kernel = self.kernels.setdefault((kind, name), Kernel())
        kernel.microseconds += microseconds
        kernel.calls += 1

    def lines(self, floors: dict[str, float] | None = None) -> list[str]:
        """A table for the log; ``floors`` gives, per kind, the seconds a step that the device's ceilings allow at best."""
        total = sum(self.kinds.values()) or 1.0
        lines = [f"{'kind':<18}{'ms/step':>10}{'share':>8}{'x floor':>9}"]
        for kind, microseconds in sorted(self.kinds.items(), key=lambda item: -item[1]):
            seconds = microseconds / 1e6 / self.steps
            floor = (floors or {}).get(kind)
            lines.append(
                f"{kind:<18}{1e3 * seconds:>10.2f}{percent(microseconds / total):>8}{seconds / floor if floor else float('nan'):>9.1f}"
            )
        lines += ["", f"{'ms/step':>9}{'calls':>7}  kernel"]
        for (kind, name), kernel in sorted(self.kernels.items(), key=lambda item: -item[1].microseconds)[:TOP_KERNELS]:
            lines.append(f"{kernel.microseconds / 1e3 / self.steps:>9.2f}{kernel.calls // self.steps:>7}  [{kind}] {name[:70]}")
        return [line.replace("      nan", "        -") for line in lines]


def kind_of(names: Iterable[str]) -> str:
    """The kind of a kernel from its own name and those of the ops and scopes around it."""
    joined = [name.lower() for name in names]
    return next((kind for kind, parts in KINDS if any(part in name for part in parts for name in joined)), OTHER)


def breakdown(events: Sequence[Any], steps: int) -> Breakdown:
    """Groups a torch profiler's events: device time where kernels ran on a GPU, else the ops' own CPU time."""
    found = Breakdown(steps)
    on_device = any(event.kernels for event in events)
    for event in events:
        around = [event.name]
        parent = event.cpu_parent
        while parent is not None:
            around.append(parent.name)
            parent = parent.cpu_parent
        if on_device:
            for kernel in event.kernels:
                found.add(kind_of([kernel.name, *around]), kernel.name, kernel.duration)
        elif event.self_cpu_time_total > 0:
            found.add(kind_of(around), event.name, event.self_cpu_time_total)
    return found


class Profile:
    """A callback of the training loop: profiles the configured steps on the main rank, then writes the trace and prints the table."""

    def __init__(self, run_dir: Path, steps: str, topology: HasRank, floors: dict[str, float] | None = None) -> None:
        """``steps``: first and last step, as in ``10-12``. ``floors``: see ``Breakdown.lines``."""
        self._folder = Path(run_dir) / "profile"
        self._first, self._last = (int(part) for part in steps.split("-"))
        self._enabled = topology.rank == 0 and self._first <= self._last
        self._floors = floors
        self._profiler: Any = None

    def on_start(self, run: Any) -> None:
        """Starts at once if the next step is the first to profile."""
        self._start_before(run, run.state.step + 1)

    def on_step(self, run: Any, record: Any) -> None:
        """Stops after the last step; starts before the first."""
        if self._profiler is not None and record.step >= self._last:
            self._finish(run)
        self._start_before(run, record.step + 1)

    def on_stop(self, run: Any, reason: str) -> None:
        """A run that ends inside the range keeps what it has."""
        if self._profiler is not None:
            self._last = run.state.step
            self._finish(run)

    def on_row(self, run: Any, row: Any) -> None:
        """Rows do not matter here."""

    def on_save(self, run: Any) -> None:
        """Nor do checkpoints."""

    def _start_before(self, run: Any, step: int) -> None:
        if not self._enabled or step != self._first:
            return
        run.engine.watchers.add("profile")  # kernels of a replay do not tell which op launched them
        import torch
        from torch.profiler import ProfilerActivity, profile

        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            activities.append(ProfilerActivity.CUDA)
        self._profiler = profile(activities=activities, acc_events=True)
        self._profiler.start()

    def _finish(self, run: Any) -> None:
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
        run.engine.watchers.discard("profile")
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        trace = self._folder / f"trace-steps-{self._first}-{self._last}.json.gz"
        profiler.export_chrome_trace(str(trace))
        table = "\n".join(breakdown(profiler.events(), self._last - self._first + 1).lines(self._floors))
        (self._folder / f"kernels-steps-{self._first}-{self._last}.txt").write_text(table + "\n")
        log.info("profile of steps %d-%d (trace: %s)\n%s", self._first, self._last, trace, table)
