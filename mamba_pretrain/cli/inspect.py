"""Commands that look: ``plan`` and ``doctor`` before a run, ``watch`` and ``report`` during and after it."""

from __future__ import annotations

import sys
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


def plan(
    config: Path = typer.Argument(help="YAML config, for example configs/mamba2/130m.yaml"),
    overrides: list[str] = typer.Argument(None, metavar="[KEY.PATH=VALUE]...", help="Overrides, for example train.micro_batch_size=8"),
    gpus: int = typer.Option(1, min=1, help="Number of GPUs"),
    device: str = typer.Option(None, help="GPU, for example H100, 'A100-SXM4-40GB' or cpu; default: this machine's, else H100"),
    gpus_per_node: int = typer.Option(8, min=1, help="GPUs of a node"),
    between_nodes: float = typer.Option(40.0, min=0.1, help="Bandwidth between nodes per GPU, GB/s"),
    find: bool = typer.Option(False, help="Propose the engine, micro-batch and checkpointing that fit and are fastest"),
    json_output: bool = typer.Option(False, "--json", help="Print the plan as JSON"),
) -> None:
    """Say what a run needs before it queues: memory by part, time and GPU-hours, communication, disk, and what looks wrong.

    Example: `mamba-pretrain plan configs/mamba2/1.3b.yaml --gpus 64 --find`
    """
    import orjson
    from rich.console import Console

    from mamba_pretrain.config import load_config
    from mamba_pretrain.planning.communication import Network
    from mamba_pretrain.planning.plan import Machine, Planner, make_plan
    from mamba_pretrain.planning.show import show_found, show_plan

    run = load_config(config, overrides or [])
    network = Network(gpus_per_node=gpus_per_node, between_nodes=between_nodes * 1e9)
    machine = Machine.of(device or _gpu_here() or "H100", gpus, network)
    console = Console()
    if find:
        found = Planner(run, machine).best()
        if json_output:
            typer.echo(orjson.dumps(found, option=orjson.OPT_INDENT_2).decode())
        else:
            show_found(found, machine, console)
        raise typer.Exit(0 if found else 1)
    made = make_plan(run, machine)
    if json_output:
        typer.echo(orjson.dumps(made.to_dict(), option=orjson.OPT_INDENT_2).decode())
    else:
        show_plan(made, console)


def _gpu_here() -> str | None:
    """The name of this machine's first GPU."""
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None


def doctor(
    config: Path = typer.Argument(None, help="YAML config: also check this run's datasets, run folder and tracking"),
    overrides: list[str] = typer.Argument(
        None, metavar="[KEY.PATH=VALUE]...", help="Overrides, for example data.sources.0.path=data/corpus"
    ),
    run_dir: Path = typer.Option(Path("runs"), help="Without a config: folder whose disk and checkpoints are checked"),
    json_output: bool = typer.Option(False, "--json", help="Print the findings as JSON"),
) -> None:
    """Check installation, kernels, GPU, disk, collectives and inputs. Green: well. Red: training will fail or suffer. Yellow: something is
    missing that this training can do without. Red and yellow lines say how to mend it. Exit code 1 if any is red.

    Example: `mamba-pretrain doctor configs/quickstart.yaml data.sources.0.path=data/corpus`
    """
    import orjson
    from rich.console import Console

    from mamba_pretrain.config import load_config
    from mamba_pretrain.doctor.check import Check
    from mamba_pretrain.doctor.examine import Screen, examine

    run = load_config(config, overrides or []) if config is not None else None
    console = Console(stderr=json_output, quiet=json_output and not sys.stderr.isatty())
    found = []
    with Screen(console) as screen:
        for finding in examine(run.run_dir if run is not None else run_dir, run):
            screen.show(finding)
            if isinstance(finding, Check):
                found.append(finding)
    wrong, missing = (sum(check.status == status for check in found) for status in ("red", "yellow"))
    if json_output:
        typer.echo(orjson.dumps(found, option=orjson.OPT_INDENT_2).decode())
    else:
        verdict = f"{wrong} to mend" if wrong else "all well: training works here"
        console.print(f"\n{verdict}{f', {missing} optional missing' if missing else ''}", style="red" if wrong else "green")
    raise typer.Exit(1 if wrong else 0)
