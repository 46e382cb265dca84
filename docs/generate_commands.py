"""Writes docs/commands.md from the command lines' own help, so that it cannot say anything else.

python docs/generate_commands.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

HEADER = """# Commands

Two command lines: `mamba-data` makes datasets, `mamba-pretrain` does the rest. Wrong input is one sentence on stderr and exit code 2; a failed run
is 1; a run that saved itself and is to be started again is 85. Every command answers `--help`.

This page is written by `python docs/generate_commands.py`.
"""
HIDDEN = ("install_completion", "show_completion", "help")


def option_row(parameter: Any) -> str:
    """One line of the table of options."""
    name = ", ".join(f"`{flag}`" for flag in [*parameter.opts, *parameter.secondary_opts])
    default = getattr(parameter.default, "value", parameter.default)
    plain = isinstance(default, int | float | str) and not isinstance(default, bool) and default != ""
    return f"| {name} | {describe(parameter, f'default `{default}`' if plain else '')} |"


def argument_row(parameter: Any) -> str:
    """One line for a positional argument."""
    name = (parameter.metavar or parameter.name).upper().strip("[]{}.")
    return f"| `{name}` | {describe(parameter, '')} |"


def describe(parameter: Any, default: str) -> str:
    """Help, and in brackets whether it is required or what it is otherwise."""
    note = "required" if parameter.required else default
    return escape(getattr(parameter, "help", None) or "") + (f" ({note})" if note else "")


def escape(text: str) -> str:
    """For a table cell."""
    return " ".join(text.split()).replace("|", "\\|").replace("*", "\\*")


def section(program: str, name: str, command: Any) -> str:
    """A command's heading, text and table."""
    text = (command.help or "").strip()
    rows = []
    for parameter in command.params:
        if parameter.name in HIDDEN or getattr(parameter, "hidden", False):
            continue
        rows.append(argument_row(parameter) if parameter.param_type_name == "argument" else option_row(parameter))
    table = "\n".join(["| argument or option | |", "|---|---|", *rows]) if rows else ""
    return f"## {program} {name}\n\n{text}\n\n{table}\n"


def commands(app: typer.Typer) -> dict[str, Any]:
    """Every command of a command line, in its own order."""
    group: Any = typer.main.get_command(app)
    context = typer.Context(group)
    return {name: group.get_command(context, name) for name in group.list_commands(context)}


def page() -> str:
    """The whole page."""
    from data_tools.cli.app import app as data_app
    from mamba_pretrain.cli import app as main_app

    parts = [HEADER]
    for program, app in (("mamba-data", data_app), ("mamba-pretrain", main_app)):
        parts += [section(program, name, command) for name, command in commands(app).items()]
    return "\n".join(parts).rstrip() + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("commands.md").write_text(page())
