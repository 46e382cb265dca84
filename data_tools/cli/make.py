"""Commands that make tokenizers and datasets."""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from data_tools.cli.options import DATASETS, EXCLUDE, FILES_FROM, FORMAT, INCLUDE, OVERWRITE, TEXT, TEXT_KEY, Kind, summarize
from data_tools.errors import UserError

if TYPE_CHECKING:
    from data_tools.parts import Task


class TokenizerModel(str, Enum):
    """SentencePiece's algorithms."""

    bpe = "bpe"
    unigram = "unigram"


class OnError(str, Enum):
    """What to do with a malformed record."""

    fail = "fail"
    skip = "skip"


class Dedup(str, Enum):
    """Which duplicates to drop."""

    none = "none"
    exact = "exact"


class EncoderName(str, Enum):
    """Who encodes."""

    auto = "auto"
    gigatoken = "gigatoken"
    fastokens = "fastokens"
    reference = "reference"


def train_tokenizer(
    text: list[str] = TEXT,
    output: Path = typer.Option(..., help="Folder to write"),
    vocab_size: int = typer.Option(32000, min=260, help="Tokens, 256 bytes and 3 control tokens included"),
    model: TokenizerModel = typer.Option(TokenizerModel.bpe, help="Algorithm"),
    files_from: Path | None = FILES_FROM,
    include: list[str] = INCLUDE,
    exclude: list[str] = EXCLUDE,
    kind: Kind | None = FORMAT,
    text_key: str = TEXT_KEY,
    datasets: bool = DATASETS,
    sample_mb: int = typer.Option(200, min=1, help="At most this much text is used, from all over the input"),
    seed: int = typer.Option(0, help="Seed of the sample"),
    overwrite: bool = typer.Option(False, help="Replace the tokenizer that --output holds"),
) -> None:
    """Train a SentencePiece tokenizer with byte fallback on a sample of the text.

    Example: `mamba-data train-tokenizer texts/ --output tokenizer --vocab-size 32000`
    """
    from data_tools.tokenizer_training import train_tokenizer as run

    tasks = _tasks(text, files_from, include, exclude, kind, datasets)
    result = run(tasks, output, vocab_size, model.value, text_key, sample_mb << 20, seed, overwrite)
    typer.echo(
        f"wrote {result.path}: {vocab_size:,} tokens from {result.documents:,} documents, {result.bytes_per_token:.3f} bytes per token held out"
    )


def export_tokenizer(
    tokenizer: Path = typer.Argument(help="Folder or file: SentencePiece tokenizer.model or Hugging Face tokenizer.json"),
    output: Path = typer.Option(..., help="Folder to write"),
    overwrite: bool = typer.Option(False, help="Write into --output even if it holds files"),
) -> None:
    """Write a tokenizer as files that transformers' `AutoTokenizer` loads, with the same ids. `mamba-pretrain export` does so with a model.

    Example: `mamba-data export-tokenizer tokenizer --output tokenizer-hf`
    """
    from data_tools.folders import check_empty
    from data_tools.tokenizer_export import export_tokenizer as run

    check_empty(output, overwrite)
    ends = run(tokenizer, output)
    typer.echo(f"wrote {output}: AutoTokenizer.from_pretrained({str(output)!r}) gives the same ids; end of document {ends['eos_token_id']}")


def tokenize(
    text: list[str] = TEXT,
    tokenizer: str = typer.Option(..., help="Folder or file: SentencePiece tokenizer.model or Hugging Face tokenizer.json"),
    output: Path = typer.Option(..., help="Dataset folder to write"),
    validation_fraction: float = typer.Option(
        0.0, min=0.0, max=0.5, help="Share of the documents for validation, chosen by a hash of their text"
    ),
    files_from: Path | None = FILES_FROM,
    include: list[str] = INCLUDE,
    exclude: list[str] = EXCLUDE,
    kind: Kind | None = FORMAT,
    text_key: str = TEXT_KEY,
    datasets: bool = DATASETS,
    eos: bool = typer.Option(True, help="End every document with the tokenizer's end token"),
    bos: bool = typer.Option(False, help="Begin every document with the tokenizer's begin token"),
    nfc: bool = typer.Option(False, help="Normalise text to Unicode NFC"),
    dedup: Dedup = typer.Option(Dedup.none, help="exact: of equal documents keep the first"),
    on_error: OnError = typer.Option(
        OnError.fail, help="fail: stop at the first malformed record; skip: leave such records out, and count them"
    ),
    encoder: EncoderName = typer.Option(EncoderName.auto, help="auto: the fastest whose ids equal the reference library's on this text"),
    check_every: int = typer.Option(10_000, min=1, help="A fast encoder is compared with the reference on one document in this many"),
    workers: int = typer.Option(0, min=0, help="Processes; 0: one for each core that this process may use"),
    task_index: int | None = typer.Option(None, min=0, help="This process's part, as a job array's task: 0 ... task-count - 1"),
    task_count: int | None = typer.Option(
        None, min=1, help="Parts in all; when all are done, `mamba-data merge OUTPUT` completes the dataset"
    ),
    seed: int = typer.Option(0, help="Seed of the validation split"),
    overwrite: bool = OVERWRITE,
) -> None:
    """Tokenize and pack text into Megatron .bin/.idx shards with a manifest. Interrupted, the same command continues.

    Example: `mamba-data tokenize texts/ --tokenizer tokenizer --output data/corpus --validation-fraction 0.005`
    """
    from data_tools.pipeline import Share
    from data_tools.pipeline import tokenize as run
    from data_tools.pool import available_cores
    from data_tools.stdin import kept
    from data_tools.worker import Options

    if (task_index is None) != (task_count is None):
        raise UserError("--task-index and --task-count belong together; give both or neither")
    share = Share(task_index, task_count) if task_index is not None and task_count is not None else None
    options = Options(
        tokenizer, text_key, eos, bos, nfc, validation_fraction, seed, on_error.value, dedup.value, encoder.value, check_every
    )
    with kept(text or [], output, sys.stdin.buffer) as sources:
        tasks = _tasks(sources, files_from, include, exclude, kind, datasets)
        manifest = run(tasks, options, output, workers or available_cores(), overwrite, share)
    if manifest is None:
        typer.echo(f"part {task_index} of {task_count} of {output} is done; when all are, complete it with `mamba-data merge {output}`")
    else:
        summarize(output, manifest)


def import_(
    files: list[Path] = typer.Argument(help="Token files: .npy, raw dumps (.bin with --dtype), datatrove .ds, Megatron .idx"),
    tokenizer: str = typer.Option(..., help="Folder or file of the tokenizer that made the ids"),
    output: Path = typer.Option(..., help="Dataset folder to write"),
    split: str = typer.Option("train", help="train or validation"),
    dtype: str | None = typer.Option(None, help="How a raw dump stores its ids: uint8, uint16, uint32, int32 or int64"),
    overwrite: bool = OVERWRITE,
) -> None:
    """Turn token files of other tools into a dataset. In dumps without an index a document ends with the end token.

    Example: `mamba-data import old/train.bin --dtype uint16 --tokenizer gpt2 --output data/old`
    """
    from data_tools.importing import import_tokens

    summarize(output, import_tokens(files, tokenizer, output, split, dtype, overwrite))


def _tasks(
    text: list[str] | None, files_from: Path | None, include: list[str], exclude: list[str], kind: Kind | None, datasets: bool
) -> list[Task]:
    from data_tools.sources import find_files, plan_datasets, plan_tasks, read_list

    sources = [*(text or []), *(read_list(files_from) if files_from else [])]
    if datasets:
        return plan_datasets(sources)
    return plan_tasks(find_files(sources, include, exclude), kind.value if kind else None)
