"""Commands that make datasets of datasets."""

from __future__ import annotations

from pathlib import Path

import typer

from data_tools.cli.make import Dedup
from data_tools.cli.options import DATASET, OVERWRITE, summarize
from data_tools.errors import UserError


def merge(
    datasets: list[Path] = typer.Argument(
        help="Dataset folders made with one tokenizer; or the one --output of an array of tokenize tasks"
    ),
    output: Path | None = typer.Option(None, help="Dataset folder to write; left out to complete an array's dataset in its place"),
    dedup: Dedup = typer.Option(Dedup.none, help="exact: of equal documents keep the first, training documents before validation"),
    overwrite: bool = OVERWRITE,
) -> None:
    """Put datasets together into one, or complete the dataset of a job array. Shards are linked where the file system can, else copied.

    Example: `mamba-data merge data/books data/web --output data/all --dedup exact`
    """
    from data_tools.merging import merge as run
    from data_tools.pipeline import finish

    if output is not None:
        summarize(output, run(datasets, output, overwrite, dedup is Dedup.exact))
        return
    if len(datasets) > 1:
        raise UserError(f"{len(datasets)} datasets are named but no place for the result; pass --output")
    if dedup is Dedup.exact:
        raise UserError("--dedup makes new shards; pass --output too")
    summarize(datasets[0], finish(datasets[0]))


def split(
    dataset: Path = DATASET,
    output: Path = typer.Option(..., help="Dataset folder to write"),
    validation_fraction: float = typer.Option(..., min=0.0, max=0.5, help="Share of the training documents that goes to validation"),
    seed: int = typer.Option(0, help="Seed of the choice"),
    overwrite: bool = OVERWRITE,
) -> None:
    """Move a share of the training documents to validation, chosen by a hash of their tokens, as for an imported dataset.

    Example: `mamba-data split data/old --output data/new --validation-fraction 0.01`
    """
    from data_tools.merging import split as run

    summarize(output, run(dataset, output, validation_fraction, seed, overwrite))
