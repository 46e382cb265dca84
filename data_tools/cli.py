"""``mamba-data``: from text to token shards."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from enum import Enum
from pathlib import Path

import typer

from data_tools.errors import UserError

app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown", pretty_exceptions_enable=False, add_completion=False)

TEXT = typer.Argument(help="Files, folders or globs: text, JSONL (.gz, .zst), Parquet, Arrow; with --datasets, names for `datasets`")
INCLUDE = typer.Option([], help="Patterns of files to take from folders, such as '**/*.py'; default: by their ending")
EXCLUDE = typer.Option([], help="Patterns of files to leave out")
TEXT_KEY = typer.Option("text", help="Key or column of the text; dots lead into nested records")
DATASETS = typer.Option(
    False, "--datasets", help="The inputs are names or folders for Hugging Face `datasets` (NAME or NAME:CONFIG), streamed"
)
OVERWRITE = typer.Option(False, help="Replace an existing output")
DATASET = typer.Argument(help="Dataset folder, written by tokenize")
SPLIT = typer.Option("train", help="train or validation")


class TokenizerModel(str, Enum):
    """SentencePiece's algorithms."""

    bpe = "bpe"
    unigram = "unigram"


class OnError(str, Enum):
    """What to do with a malformed record."""

    fail = "fail"
    skip = "skip"


@app.callback()
def _root() -> None:
    """Turn raw text into packed token shards, and prove what came out."""


@app.command("train-tokenizer")
def train_tokenizer(
    text: list[str] = TEXT,
    output: Path = typer.Option(..., help="Folder to write"),
    vocab_size: int = typer.Option(32000, min=259, help="Tokens, 256 bytes and 3 control tokens included"),
    model: TokenizerModel = typer.Option(TokenizerModel.bpe, help="Algorithm"),
    include: list[str] = INCLUDE,
    exclude: list[str] = EXCLUDE,
    text_key: str = TEXT_KEY,
    datasets: bool = DATASETS,
    sample_mb: int = typer.Option(200, min=1, help="At most this much text is used"),
    seed: int = typer.Option(0, help="Seed of the sample"),
    overwrite: bool = OVERWRITE,
) -> None:
    """Train a SentencePiece tokenizer with byte fallback on a sample of the text.

    Example: `mamba-data train-tokenizer texts/ --output tokenizer --vocab-size 32000`
    """
    from data_tools.tokenizer_training import train_tokenizer as run

    result = run(_tasks(text, include, exclude, datasets), output, vocab_size, model.value, text_key, sample_mb << 20, seed, overwrite)
    typer.echo(
        f"wrote {result.path}: {vocab_size:,} tokens from {result.documents:,} documents, {result.bytes_per_token:.3f} bytes per token held out"
    )


@app.command()
def tokenize(
    text: list[str] = TEXT,
    tokenizer: str = typer.Option(..., help="Folder or file: SentencePiece tokenizer.model or Hugging Face tokenizer.json"),
    output: Path = typer.Option(..., help="Dataset folder to write"),
    validation_fraction: float = typer.Option(
        0.0, min=0.0, max=0.5, help="Share of the documents for validation, chosen by a hash of their text"
    ),
    include: list[str] = INCLUDE,
    exclude: list[str] = EXCLUDE,
    text_key: str = TEXT_KEY,
    datasets: bool = DATASETS,
    eos: bool = typer.Option(True, help="End every document with the tokenizer's end token"),
    bos: bool = typer.Option(False, help="Begin every document with the tokenizer's begin token"),
    nfc: bool = typer.Option(False, help="Normalise text to Unicode NFC"),
    on_error: OnError = typer.Option(OnError.fail, help="fail: stop at the first malformed record; skip: leave it out and count it"),
    workers: int = typer.Option(0, min=0, help="Processes; 0: one per core"),
    seed: int = typer.Option(0, help="Seed of the validation split"),
    overwrite: bool = OVERWRITE,
) -> None:
    """Tokenize and pack text into Megatron .bin/.idx shards with a manifest. Interrupted, the same command continues.

    Example: `mamba-data tokenize texts/ --tokenizer tokenizer --output data/corpus --validation-fraction 0.005`
    """
    from data_tools.pipeline import Options
    from data_tools.pipeline import tokenize as run

    options = Options(tokenizer, text_key, eos, bos, nfc, validation_fraction, seed, on_error.value)
    manifest = run(_tasks(text, include, exclude, datasets), options, output, workers or os.cpu_count() or 1, overwrite)
    assert manifest is not None
    for name, split in manifest.splits.items():
        typer.echo(f"{output} {name}: {split.documents:,} documents, {split.tokens:,} tokens in {len(split.shards)} shards")
    if manifest.counts["malformed"] or manifest.counts["empty"]:
        typer.echo(f"left out: {manifest.counts['malformed']:,} malformed records, {manifest.counts['empty']:,} empty documents")


@app.command()
def verify(dataset: Path = DATASET) -> None:
    """Check every file of a dataset against its manifest: checksums, counts, ids within the vocabulary.

    Example: `mamba-data verify data/corpus`
    """
    from data_tools.looking import verify as run

    problems = run(dataset)
    if problems:
        raise UserError(
            f"{problems[0]}" + (f" (and {len(problems) - 1} more problems)" if len(problems) > 1 else "") + "; copy or tokenize again"
        )
    typer.echo(f"{dataset}: every file is as it was written")


@app.command()
def stats(
    dataset: Path = DATASET,
    split: str = SPLIT,
    sequence_length: int = typer.Option(2048, min=2, help="Sequence length for the share of documents that packing cuts"),
) -> None:
    """Documents, tokens, lengths, the commonest tokens and the unigram entropy of a split.

    Example: `mamba-data stats data/corpus --split validation`
    """
    from data_tools.looking import histogram
    from data_tools.looking import stats as run

    found = run(dataset, split)
    bytes_per_token = "" if found.bytes_per_token is None else f", {found.bytes_per_token:.3f} bytes per token"
    typer.echo(f"{dataset} {split}: {found.documents:,} documents, {found.tokens:,} tokens{bytes_per_token}")
    typer.echo(f"unigram entropy {found.unigram_entropy:.4f} nats per token; commonest tokens:")
    typer.echo("  " + "  ".join(f"{token} {share:.1%}" for token, share in found.top_tokens))
    typer.echo(f"packed to {sequence_length}: {found.truncated(sequence_length):.1%} of the documents that would fit are cut by `concat`")
    typer.echo("length in tokens:")
    for line in histogram(found.lengths):
        typer.echo(f"  {line}")


@app.command()
def inspect(
    dataset: Path = DATASET,
    document: int = typer.Argument(0, min=0, help="Number of the document"),
    split: str = SPLIT,
    ids: bool = typer.Option(False, help="Show token ids too"),
    limit: int = typer.Option(200, min=1, help="Tokens to show"),
) -> None:
    """Decode a document; alternating colours show the tokens on a terminal.

    Example: `mamba-data inspect data/corpus 7`
    """
    from data_tools.looking import document as read
    from data_tools.looking import shown
    from data_tools.tokenizers import load_tokenizer

    tokens = read(dataset, split, document)
    tokenizer = load_tokenizer(dataset / "tokenizer")
    typer.echo(f"document {document} of {split}: {len(tokens):,} tokens")
    if ids:
        typer.echo(" ".join(map(str, tokens[:limit])))
    if sys.stdout.isatty():
        colours = ("cyan", "green")
        for i, token in enumerate(tokens[:limit].tolist()):
            typer.secho(shown(tokenizer, token), fg=colours[i % 2], nl=False)
        typer.echo()
    else:
        typer.echo(tokenizer.decode(tokens[:limit].tolist()))


@app.command()
def merge(
    datasets: list[Path] = typer.Argument(help="Dataset folders made with one tokenizer"),
    output: Path = typer.Option(..., help="Dataset folder to write"),
    overwrite: bool = OVERWRITE,
) -> None:
    """Put datasets together into one, as a Slurm array of tokenize tasks needs it. Files are linked where the file system can, else copied.

    Example: `mamba-data merge data/part-0 data/part-1 --output data/corpus`
    """
    from data_tools.merging import merge as run

    manifest = run(datasets, output, overwrite)
    for name, split in manifest.splits.items():
        typer.echo(f"{output} {name}: {split.documents:,} documents, {split.tokens:,} tokens in {len(split.shards)} shards")


def _tasks(text: list[str], include: list[str], exclude: list[str], datasets: bool) -> list:
    from data_tools.sources import find_files, plan_datasets, plan_tasks

    if datasets:
        return plan_datasets(text)
    return plan_tasks(find_files(text, include, exclude))


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: wrong input is one sentence on stderr and exit code 2."""
    try:
        app(args=list(arguments) if arguments is not None else None, prog_name="mamba-data")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
