"""Tokenize and pack: one task, one shard; finished shards survive any interruption, and the result does not depend on the workers.

Work happens in ``OUT.partial``. A task writes its shards, forces them to disk and then writes its record; the records of the same plan are
believed on a restart. When all are there the manifest is written and the folder gets its name by one rename.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from data_tools.errors import UserError
from data_tools.indexed import IndexedWriter, best_dtype, paths
from data_tools.inputs import Part, Record, read_part
from data_tools.manifest import FILE_NAME, Manifest, Shard, Split, TokenizerInfo, xxh3
from data_tools.progress import Progress
from data_tools.tokenizers import Tokenizer, load_tokenizer

BATCH_CHARACTERS = 1 << 20
SPLITS = ("train", "validation")


@dataclass(frozen=True)
class Options:
    """Everything that decides the output besides the text."""

    tokenizer: str
    text_key: str = "text"
    append_eos: bool = True
    prepend_bos: bool = False
    normalize_nfc: bool = False
    validation_fraction: float = 0.0
    seed: int = 0
    on_error: str = "fail"


@dataclass
class TaskResult:
    """What a task wrote and counted."""

    shards: dict[str, dict[str, Any]] = field(default_factory=dict)
    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    empty: int = 0
    malformed: int = 0
    problems: list[str] = field(default_factory=list)


def plan_hash(tasks: list[list[Part]], options: Options, tokenizer_hash: str) -> str:
    """Identifies a run of the pipeline: a restart continues only the same one. Files count with size and time of change."""
    parts = [[{**part.to_dict(), **_stamp(part.path)} for part in task] for task in tasks]
    body = json.dumps([parts, asdict(options), tokenizer_hash], sort_keys=True)
    return hashlib.sha256(body.encode()).hexdigest()[:16]


def _stamp(path: str) -> dict[str, int]:
    if not os.path.isfile(path):
        return {}
    status = os.stat(path)
    return {"size": status.st_size, "changed": status.st_mtime_ns}


def tokenize(tasks: list[list[Part]], options: Options, out: Path, workers: int, overwrite: bool = False) -> Manifest:
    """Runs the tasks in ``workers`` processes and writes the dataset folder ``out``; returns its manifest.

    Raises UserError if ``out`` holds files, if a record is malformed (with ``on_error="fail"``), or if there is no document at all.
    """
    if out.exists() and any(out.iterdir()) and not overwrite:
        raise UserError(f"{out} already holds files; choose another --output or pass --overwrite")
    tokenizer = load_tokenizer(options.tokenizer)
    if options.append_eos and tokenizer.eos_id is None:
        raise UserError(f"tokenizer {options.tokenizer} has no end-of-document token; pass --no-eos, or use one that has")
    if options.prepend_bos and tokenizer.bos_id is None:
        raise UserError(f"tokenizer {options.tokenizer} has no begin-of-document token; leave --bos out, or use one that has")
    work = out.with_name(f"{out.name}.partial")
    _continue_or_start(work, plan_hash(tasks, options, tokenizer.hash))
    try:
        results = _run(tasks, options, work, workers)
        manifest = _assemble(results, tasks, options, tokenizer, work)
    except UserError:
        shutil.rmtree(work)
        raise
    if out.exists():
        shutil.rmtree(out)
    os.replace(work, out)
    return manifest


def _continue_or_start(work: Path, plan: str) -> None:
    marker = work / "plan"
    if marker.is_file() and marker.read_text() == plan:
        return
    if work.exists():
        shutil.rmtree(work)
    work.mkdir(parents=True)
    marker.write_text(plan)


def _run(tasks: list[list[Part]], options: Options, work: Path, workers: int) -> list[TaskResult]:
    results: dict[int, TaskResult] = {}
    for number in range(len(tasks)):
        record = _record_path(work, number)
        if record.is_file():
            results[number] = TaskResult(**json.loads(record.read_text()))
    waiting = [number for number in range(len(tasks)) if number not in results]
    sizes = [sum(_size(part) for part in task) for task in tasks]
    with Progress("tokenizing", sum(sizes)) as progress:
        for number, result in results.items():
            progress.add(sizes[number], result.documents, result.tokens)
        for number, result in _execute(waiting, tasks, options, work, workers):
            results[number] = result
            progress.add(sizes[number], result.documents, result.tokens)
    return [results[number] for number in range(len(tasks))]


def _size(part: Part) -> int:
    if part.end >= 0:
        return part.end - part.begin
    return os.path.getsize(part.path) if os.path.isfile(part.path) else 0


def _execute(waiting: list[int], tasks: list[list[Part]], options: Options, work: Path, workers: int) -> Iterator[tuple[int, TaskResult]]:
    if workers == 1 or len(waiting) <= 1:
        tokenizer = load_tokenizer(options.tokenizer)
        for number in waiting:
            yield number, run_task(number, tasks[number], options, work, tokenizer)
        return
    context = multiprocessing.get_context("spawn")  # a forked process would inherit threads of the tokenizer libraries in unknown states
    with ProcessPoolExecutor(
        min(workers, len(waiting)), mp_context=context, initializer=_open_tokenizer, initargs=(options.tokenizer,)
    ) as pool:
        futures = {pool.submit(_run_in_worker, number, tasks[number], options, work): number for number in waiting}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


_worker_tokenizer: Tokenizer | None = None


def _open_tokenizer(path: str) -> None:
    global _worker_tokenizer
    _worker_tokenizer = load_tokenizer(path)


def _run_in_worker(number: int, task: list[Part], options: Options, work: Path) -> TaskResult:
    assert _worker_tokenizer is not None
    return run_task(number, task, options, work, _worker_tokenizer)


def _record_path(work: Path, number: int) -> Path:
    return work / f"{number:05d}.json"


def run_task(number: int, task: list[Part], options: Options, work: Path, tokenizer: Tokenizer) -> TaskResult:
    """Encodes a task's documents into one shard per split, and writes the task's record last."""
    result = TaskResult()
    writers: dict[str, IndexedWriter] = {}
    bytes_of = dict.fromkeys(SPLITS, 0)
    dtype = best_dtype(tokenizer.vocab_size)
    try:
        for split, texts in _batches(task, options, result):
            if split not in writers:
                writers[split] = IndexedWriter(work / split / f"{number:05d}", dtype)
            tokens, lengths = _joined(tokenizer.encode_batch(texts), tokenizer, options)
            writers[split].add(tokens, lengths)
            result.documents += len(texts)
            result.tokens += len(tokens)
            size = sum(len(text.encode()) for text in texts)
            bytes_of[split] += size
            result.text_bytes += size
        for split, writer in writers.items():
            writer.close()
            result.shards[split] = asdict(_describe(split, number, writer, bytes_of[split]))
    except BaseException:
        for writer in writers.values():
            writer.abort()
        raise
    temporary = work / f".tmp-{number:05d}.json"
    with temporary.open("w") as file:
        json.dump(asdict(result), file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, _record_path(work, number))
    return result


def _describe(split: str, number: int, writer: IndexedWriter, text_bytes: int) -> Shard:
    bin_path, idx_path = paths(writer.bin_path.with_suffix(""))
    return Shard(f"{split}/{number:05d}", writer.documents, writer.tokens, writer.dtype.name, xxh3(bin_path), xxh3(idx_path), text_bytes)


def _batches(task: list[Part], options: Options, result: TaskResult) -> Iterator[tuple[str, list[str]]]:
    """Batches of texts of one split, in the order of the input."""
    pending: dict[str, list[str]] = {split: [] for split in SPLITS}
    characters = dict.fromkeys(SPLITS, 0)
    for text in _texts(task, options, result):
        split = split_of(text, options)
        pending[split].append(text)
        characters[split] += len(text)
        if characters[split] >= BATCH_CHARACTERS:
            yield split, pending[split]
            pending[split], characters[split] = [], 0
    yield from ((split, texts) for split, texts in pending.items() if texts)


def _texts(task: list[Part], options: Options, result: TaskResult) -> Iterator[str]:
    for record in (record for part in task for record in read_part(part, options.text_key)):
        if record.text is None or record.problem:
            _malformed(record, options, result)
        elif not record.text.strip():
            result.empty += 1
        elif options.normalize_nfc:
            import unicodedata

            yield unicodedata.normalize("NFC", record.text)
        else:
            yield record.text


def _malformed(record: Record, options: Options, result: TaskResult) -> None:
    sentence = f"{record.place} {record.problem}"
    if options.on_error == "fail":
        raise UserError(f"{sentence}; mend it, or pass --on-error skip to leave such records out")
    result.malformed += 1
    result.problems = [*result.problems, sentence][:20]


def split_of(text: str, options: Options) -> str:
    """The split of a document: by a hash of its text, so that it stays when files are split, merged or reordered."""
    if not options.validation_fraction:
        return "train"
    value = xxhash.xxh3_64_intdigest(text.encode(), seed=options.seed)
    return "validation" if value < options.validation_fraction * 2**64 else "train"


def _joined(encoded: list[np.ndarray], tokenizer: Tokenizer, options: Options) -> tuple[np.ndarray, np.ndarray]:
    """Documents one after another with their control tokens, and their lengths."""
    before = int(options.prepend_bos)
    lengths = np.array([len(ids) for ids in encoded], dtype=np.int64) + before + int(options.append_eos)
    tokens = np.empty(int(lengths.sum()), dtype=np.int32)
    ends = np.cumsum(lengths)
    inside = np.ones(len(tokens), dtype=bool)
    if options.append_eos:
        tokens[ends - 1] = tokenizer.eos_id
        inside[ends - 1] = False
    if options.prepend_bos:
        tokens[ends - lengths] = tokenizer.bos_id
        inside[ends - lengths] = False
    tokens[inside] = np.concatenate(encoded)
    return tokens, lengths


def _assemble(results: list[TaskResult], tasks: list[list[Part]], options: Options, tokenizer: Tokenizer, work: Path) -> Manifest:
    splits: dict[str, Split] = {}
    for name in SPLITS:
        shards = [Shard(**result.shards[name]) for result in results if name in result.shards]
        if shards:
            splits[name] = Split(shards)
    if "train" not in splits:
        raise UserError(f"the input holds no documents ({sum(r.empty for r in results)} were empty); check the paths and --text-key")
    files = tokenizer.save(work / "tokenizer")
    info = TokenizerInfo(
        tokenizer.kind, tokenizer.hash, tokenizer.vocab_size, tokenizer.eos_id, tokenizer.bos_id, tokenizer.kind, tokenizer.version, files
    )
    policies = {key: value for key, value in asdict(options).items() if key != "tokenizer"} | {"special_tokens_in_text": "text"}
    names = ("documents", "tokens", "text_bytes", "empty", "malformed")
    counts = {name: sum(getattr(result, name) for result in results) for name in names}
    inputs = [{"path": path, **_stamp(path)} for path in sorted({part.path for task in tasks for part in task})]
    versions = {"tokenizer": tokenizer.version, "python": sys.version.split()[0], "numpy": np.__version__}
    manifest = Manifest(info, splits, policies, inputs, counts, " ".join(sys.argv), versions)
    manifest.save(work)
    for leftover in [work / "plan", *work.glob("[0-9]*.json")]:
        leftover.unlink()
    return manifest


def is_dataset(folder: Path) -> bool:
    """Whether a folder is a finished dataset."""
    return (folder / FILE_NAME).is_file()
