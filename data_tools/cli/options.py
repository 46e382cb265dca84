"""Options that several commands share."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from data_tools.manifest import Manifest

TEXT = typer.Argument(
    None,
    help="Files, folders, globs or URLs: text, JSONL (.gz, .zst), Parquet, Arrow; - reads JSONL from stdin; with --datasets, names for `datasets`",
)
FILES_FROM = typer.Option(None, help="File that lists inputs, one a line")
INCLUDE = typer.Option([], help="Patterns of files to take from folders, such as '**/*.py'; default: by their ending")
EXCLUDE = typer.Option([], help="Patterns of files to leave out of folders, such as '**/tests/**'")
FORMAT = typer.Option(None, "--format", help="How to read every file; default: by its ending")
TEXT_KEY = typer.Option("text", help="Key or column of the text; dots lead into nested records, such as document.body")
DATASETS = typer.Option(
    False, "--datasets", help="The inputs are NAME[:CONFIG[:SPLIT]] or folders for Hugging Face `datasets`, streamed where it can"
)
OVERWRITE = typer.Option(False, help="Replace the dataset that --output holds")
DATASET = typer.Argument(help="Dataset folder, as `mamba-data tokenize` writes it")
SPLIT = typer.Option("train", help="train or validation")


class Kind(str, Enum):
    """Kinds of input files."""

    text = "text"
    jsonl = "jsonl"
    parquet = "parquet"
    arrow = "arrow"


def summarize(folder: Path, manifest: Manifest) -> None:
    """Prints what a dataset holds and what was left out of it."""
    for name, split in manifest.splits.items():
        typer.echo(f"{folder} {name}: {split.documents:,} documents, {split.tokens:,} tokens in {len(split.shards)} shards")
    left_out = [f"{count:,} {what} documents" for what in ("empty", "malformed", "duplicates") if (count := manifest.counts.get(what))]
    if left_out:
        typer.echo(f"left out: {', '.join(left_out)}".replace("duplicates documents", "duplicate documents"))
    for problem in manifest.policies.get("problems", [])[:5]:
        typer.echo(f"  {problem}")
