"""Commands that look at a dataset."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from data_tools.cli.options import DATASET, SPLIT
from data_tools.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from data_tools.tokenizers import Tokenizer

COLOURS = ("cyan", "green", "yellow", "magenta")


def verify(
    dataset: Path = DATASET,
    inputs: bool = typer.Option(False, help="Compare the text files too with what was read"),
) -> None:
    """Check every file of a dataset against its manifest: checksums, counts, boundaries, ids within the vocabulary, tokenizer.

    Example: `mamba-data verify data/corpus`
    """
    from data_tools.verification import verify as run

    problems = run(dataset, inputs)
    for problem in problems[1:10]:
        print(problem, file=sys.stderr)
    if problems:
        more = f" (and {len(problems) - 1} more problems)" if len(problems) > 1 else ""
        raise UserError(f"{problems[0]}{more}; copy the file again from where it was written, or tokenize again")
    typer.echo(f"{dataset}: every file is as it was written")


def stats(
    dataset: Path = DATASET,
    split: str = SPLIT,
    sequence_length: int = typer.Option(2048, min=2, help="Sequence length to measure packing with"),
    png: Path | None = typer.Option(None, help="Write a picture of the documents' lengths here"),
) -> None:
    """Documents, tokens, bytes per token, lengths, the commonest tokens, duplicates, and how well packing fills sequences.

    Example: `mamba-data stats data/corpus --split validation --png lengths.png`
    """
    from data_tools.looking import Fill, histogram, plot_lengths
    from data_tools.looking import stats as run

    found = run(dataset, split)
    bytes_per_token = "" if found.bytes_per_token is None else f", {found.bytes_per_token:.3f} bytes per token"
    typer.echo(f"{dataset} {split}: {found.documents:,} documents, {found.tokens:,} tokens{bytes_per_token}")
    typer.echo(f"{found.duplicates:,} documents are exact duplicates of others")
    typer.echo(f"unigram entropy {found.unigram_entropy:.4f} nats per token; commonest tokens:")
    typer.echo("  " + "  ".join(f"{token} {share:.1%}" for token, share in found.top_tokens))
    fill = Fill.of(found.lengths, sequence_length)
    typer.echo(f"packed to {sequence_length}: concat cuts {fill.cut_by_concat:.1%} of the documents that would fit whole, and fills 100%;")
    typer.echo(f"  best-fit cuts none of them, and fills {fill.best_fit_fill:.2%} of {fill.best_fit_sequences:,} sequences")
    typer.echo("length in tokens:")
    for line in histogram(found.lengths):
        typer.echo(f"  {line}")
    if png is not None:
        plot_lengths(found, f"{dataset} {split}", png)
        typer.echo(f"wrote {png}")


def inspect(
    dataset: Path = DATASET,
    document: int = typer.Argument(0, min=0, help="Number of the document"),
    split: str = SPLIT,
    sample: int | None = typer.Option(None, min=0, help="Show this sample of concat packing (in file order) instead of a document"),
    sequence_length: int = typer.Option(2048, min=1, help="Length of the sample"),
    ids: bool = typer.Option(False, help="Show token ids too"),
    limit: int = typer.Option(200, min=1, help="Tokens to show"),
) -> None:
    """Decode a document, or a packed sample with its documents' boundaries; on a terminal colours tell tokens or documents apart.

    Example: `mamba-data inspect data/corpus --sample 3 --sequence-length 512 --limit 512`
    """
    from data_tools import looking
    from data_tools.tokenizers import load_tokenizer

    if sample is None:
        tokens = looking.document(dataset, split, document)
        typer.echo(f"document {document} of {split}: {len(tokens):,} tokens")
        groups: list[tuple[int | None, np.ndarray]] = [(None, tokens[:limit])]
    else:
        tokens, owners = looking.sample(dataset, split, sample, sequence_length)
        typer.echo(f"sample {sample} of {split}: {len(tokens):,} tokens of {owners[-1] - owners[0] + 1:,} documents")
        tokens, owners = tokens[:limit], owners[:limit]
        groups = [(int(owner), tokens[owners == owner]) for owner in dict.fromkeys(owners.tolist())]
    tokenizer = load_tokenizer(dataset / "tokenizer")
    for number, (owner, group) in enumerate(groups):
        if owner is not None:
            typer.secho(f"--- document {owner}", bold=True)
        if ids:
            typer.echo(" ".join(map(str, group.tolist())))
        _show(tokenizer, group, None if owner is None else COLOURS[number % len(COLOURS)])


def _show(tokenizer: Tokenizer, tokens: np.ndarray, colour: str | None) -> None:
    """Decoded text; on a terminal in one colour, or token by token in two."""
    from data_tools.looking import shown

    if not sys.stdout.isatty() or colour:
        end = "<end>" if len(tokens) and tokens[-1] == tokenizer.eos_id else ""
        typer.secho(tokenizer.decode(tokens.tolist()) + end, fg=colour)
        return
    for i, token in enumerate(tokens.tolist()):
        typer.secho(shown(tokenizer, token), fg=COLOURS[i % 2], nl=False)
    typer.echo()
