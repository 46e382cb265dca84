"""Runs the checks in order and shows them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mamba_pretrain.doctor import hardware, inputs, software
from mamba_pretrain.doctor.check import Begun, Check, guarded

if TYPE_CHECKING:
    from rich.console import Console

    from mamba_pretrain.config import RunConfig

MARKS = {"green": "[green]✓[/]", "yellow": "[yellow]![/]", "red": "[red]✗[/]", "grey": "[dim]·[/]"}
# The ops of every model, and those of each mixer.
COMMON_OPS = ("rms_norm", "linear_cross_entropy")
MIXER_OPS = {
    "mamba1": ("selective_scan", "causal_conv1d"),
    "mamba2": ("ssd_scan", "causal_conv1d", "gated_rms_norm"),
    "attention": (),
}


@dataclass(frozen=True)
class Step:
    """Checks that belong together; ``limit``: seconds that any one of them may take."""

    name: str
    check: Callable[[], Iterable[Check | Begun]]
    limit: float | None = 60.0


def examine(run_dir: Path, config: RunConfig | None = None) -> Iterator[Check | Begun]:
    """Every check, one after the other, each announced; ``config`` adds those of its data and tracking, and says what must not be missing."""
    mode = config.monitor.wandb.mode if config is not None else "offline"
    steps = [
        Step("versions", lambda: software.versions(config)),
        Step("kernel packages", software.compiled_kernels, 120.0),  # they import torch
        Step("gpu", software.gpu, 120.0),
        Step("parity", lambda: _parity(config), None),  # it has limits of its own
        Step("speed of the device", hardware.ceilings),
        Step("all-reduce", hardware.all_reduce, 120.0),
        Step(f"disk of {run_dir}", lambda: hardware.disk(run_dir), 120.0),
        Step("limits", hardware.limits),
        Step("tokenizer libraries", software.tokenizers),
        Step("wandb", lambda: software.wandb(mode)),
        Step("slurm", software.slurm),
        Step("checkpoint", lambda: inputs.checkpoint(run_dir), 600.0),  # reads it whole
    ]
    if config is not None:
        steps.append(Step("dataset", lambda: inputs.run_inputs(config), 300.0))
    for step in steps:
        yield from guarded(step.name, step.check, step.limit)


def _parity(config: RunConfig | None) -> Iterator[Check | Begun]:
    import torch

    from mamba_pretrain.doctor.parity_process import Wanted, parity_apart

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if config is None:
        return parity_apart(Wanted(device, None, {}, allow_slow=False, isolate_documents=True))
    ops = dict.fromkeys(op for mixer in config.model.layer_mixers for op in MIXER_OPS[mixer])
    return parity_apart(
        Wanted(device, [*ops, *COMMON_OPS], config.ops.require, config.ops.allow_slow, isolate_documents=config.data.isolate_documents)
    )


class Screen:
    """Shows findings as they come: on a terminal what is being waited for stands in the last line, in a log it has a line of its own."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._status = console.status("") if console.is_terminal else None

    def __enter__(self) -> Screen:
        if self._status is not None:
            self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._status is not None:
            self._status.stop()

    def show(self, finding: Check | Begun) -> None:
        """One line, and below one to mend how."""
        from rich.markup import escape

        if isinstance(finding, Begun):
            if self._status is not None:
                self._status.update(f"[dim]{escape(finding.name)} ...[/]")
            else:
                self._console.print(f"  {finding.name} ...", markup=False, highlight=False, soft_wrap=True)
            return
        line = f"{MARKS[finding.status]} {escape(finding.name)}  [dim]{escape(finding.detail)}[/]"
        self._console.print(line, highlight=False, soft_wrap=True)
        if finding.remedy:
            self._console.print(f"    [yellow]mend:[/] {escape(finding.remedy)}", highlight=False, soft_wrap=True)
