"""Commands that look: ``plan`` and ``doctor`` before a run, ``watch`` and ``report`` during and after it."""

from __future__ import annotations

from pathlib import Path

import typer


def report(
    runs: list[Path] = typer.Argument(metavar="RUN...", help="Run folders; several are overlaid and their configs compared"),
    output: Path = typer.Option(None, help="Where to write the page; default: report.html in the first run folder"),
    figures: bool = typer.Option(True, help="Also write the charts as PNGs to figures/ beside the page"),
) -> None:
    """Write one self-contained HTML page about one or several runs.

    Example: `mamba-pretrain report runs/quickstart`
    """
    from mamba_pretrain.monitor.report import write_report

    typer.echo(f"report: {write_report(runs, output, figures)}")


def watch(
    run: Path = typer.Argument(help="Run folder, of any process or node"),
    interval: float = typer.Option(1.0, min=0.1, help="Seconds between looks at the folder"),
    once: bool = typer.Option(False, help="Print one frame and leave"),
) -> None:
    """Show a run live in the terminal: loss, speed, memory, time left, checkpoints, ranks, warnings. Ctrl-C leaves it running.

    Example: `mamba-pretrain watch runs/quickstart`
    """
    from mamba_pretrain.monitor.watch import watch as show

    show(run, interval, once)
