"""The commands and their panels. What a command needs is imported when it runs."""

from __future__ import annotations

import importlib.metadata

import typer

from data_tools.cli import change, look, make

app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown", pretty_exceptions_enable=False, add_completion=False)
app.command("train-tokenizer", rich_help_panel="Make")(make.train_tokenizer)
app.command("export-tokenizer", rich_help_panel="Make")(make.export_tokenizer)
app.command("tokenize", rich_help_panel="Make")(make.tokenize)
app.command("import", rich_help_panel="Make")(make.import_)
app.command("inspect", rich_help_panel="Look")(look.inspect)
app.command("stats", rich_help_panel="Look")(look.stats)
app.command("verify", rich_help_panel="Look")(look.verify)
app.command("merge", rich_help_panel="Change")(change.merge)
app.command("split", rich_help_panel="Change")(change.split)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"mamba-data {importlib.metadata.version('mamba-pretrain')}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", help="Print the version and exit.", is_eager=True, callback=_print_version),
) -> None:
    """Turn raw text into packed token shards, and prove what came out.

    Start with `mamba-data train-tokenizer` or a tokenizer you have, then `mamba-data tokenize`.
    """
