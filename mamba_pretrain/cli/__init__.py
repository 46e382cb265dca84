"""The command line: a table of commands whose modules are imported only when a command is invoked or helped."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperGroup

from data_tools.errors import UserError
from mamba_pretrain import __version__
from mamba_pretrain.exit_codes import BAD_INPUT

# command: (module, function, panel of the help page)
COMMANDS: dict[str, tuple[str, str, str]] = {
    "quickstart": ("mamba_pretrain.cli.quickstart", "quickstart", "Start"),
    "doctor": ("mamba_pretrain.cli.inspect", "doctor", "Start"),
    "plan": ("mamba_pretrain.cli.inspect", "plan", "Start"),
    "train": ("mamba_pretrain.cli.train", "train", "Train"),
    "evaluate": ("mamba_pretrain.cli.evaluate", "evaluate", "Use"),
    "sample": ("mamba_pretrain.cli.model", "sample", "Use"),
    "export": ("mamba_pretrain.cli.model", "export", "Use"),
    "import": ("mamba_pretrain.cli.model", "import_", "Use"),
    "checkpoints": ("mamba_pretrain.cli.model", "checkpoints", "Use"),
    "convert": ("mamba_pretrain.cli.model", "convert", "Use"),
    "watch": ("mamba_pretrain.cli.inspect", "watch", "Look"),
    "report": ("mamba_pretrain.cli.inspect", "report", "Look"),
    "submit": ("mamba_pretrain.cli.launch", "submit", "Cluster"),
    "submit-data": ("mamba_pretrain.cli.launch", "submit_data", "Cluster"),
    "status": ("mamba_pretrain.cli.launch", "status", "Cluster"),
    "logs": ("mamba_pretrain.cli.launch", "logs", "Cluster"),
    "cancel": ("mamba_pretrain.cli.launch", "cancel", "Cluster"),
    "diagnose": ("mamba_pretrain.cli.launch", "diagnose", "Cluster"),
    "sync": ("mamba_pretrain.cli.launch", "sync", "Cluster"),
}


class LazyGroup(TyperGroup):
    """Lists the table above and loads a command's module when the command itself is asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Every command, in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, name: str) -> Any:
        """The command, or None with the usual suggestion of near names."""
        if name not in COMMANDS:
            return None
        module, function, panel = COMMANDS[name]
        single = typer.Typer(rich_markup_mode="markdown")
        single.command(name, rich_help_panel=panel)(getattr(importlib.import_module(module), function))
        return typer.main.get_command(single)


app = typer.Typer(cls=LazyGroup, no_args_is_help=True, rich_markup_mode="markdown", pretty_exceptions_enable=False, add_completion=False)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"mamba-pretrain {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    # A callback, as the command itself is looked for before this function's body runs.
    version: bool = typer.Option(False, "--version", help="Print the version and exit.", is_eager=True, callback=_print_version),
) -> None:
    """Pretrain Mamba language models, from one CPU to a multi-node Slurm cluster.

    Start with `mamba-pretrain quickstart`, or `mamba-pretrain train configs/quickstart.yaml`. Text becomes token shards with `mamba-data`.
    """


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: wrong input is one sentence on stderr and exit code 2."""
    given = sys.argv[1:] if arguments is None else arguments
    # `deepspeed --module mamba_pretrain train` puts its --local_rank=N before the command; ranks are read from the environment instead.
    given = [argument for argument in given if not argument.startswith("--local_rank=")]
    try:
        app(args=given, prog_name="mamba-pretrain")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(BAD_INPUT)
