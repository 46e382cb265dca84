"""Runs the checks in order and shows them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from mamba_pretrain.monitor.doctor import hardware, inputs, software
from mamba_pretrain.monitor.doctor.check import Check, guarded

if TYPE_CHECKING:
    from rich.console import Console

    from mamba_pretrain.config import RunConfig

MARKS = {"green": "[green]✓[/]", "red": "[red]✗[/]", "grey": "[dim]·[/]"}


def examine(run_dir: Path, config: RunConfig | None = None) -> Iterator[Check]:
    """Every check, one after the other; ``config`` adds those of its data and tracking."""
    mode = config.monitor.wandb.mode if config is not None else "offline"
    steps: list[tuple[str, Callable[[], Iterable[Check]]]] = [
        ("versions", software.versions),
        ("kernel packages", software.compiled_kernels),
        ("gpu", software.gpu),
        ("parity", _parity),
        ("speed of the device", hardware.ceilings),
        ("all-reduce", hardware.all_reduce),
        ("disk", lambda: hardware.disk(run_dir)),
        ("limits", hardware.limits),
        ("tokenizer libraries", software.tokenizers),
        ("wandb", lambda: software.wandb(mode)),
        ("slurm", software.slurm),
        ("checkpoint", lambda: inputs.checkpoint(run_dir)),
    ]
    if config is not None:
        steps.append(("dataset", lambda: inputs.run_inputs(config)))
    for name, check in steps:
        yield from guarded(name, check)


def _parity() -> Iterator[Check]:
    import torch

    from mamba_pretrain.monitor.doctor.parity import parity

    yield from parity(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def show(check: Check, console: Console) -> None:
    """One line, and below a red one how to mend it."""
    from rich.markup import escape

    console.print(f"{MARKS[check.status]} {escape(check.name)}  [dim]{escape(check.detail)}[/]", highlight=False, soft_wrap=True)
    if check.remedy:
        console.print(f"    [yellow]mend:[/] {escape(check.remedy)}", highlight=False, soft_wrap=True)
