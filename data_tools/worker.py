"""One task of the pipeline: a task's documents become one shard for each split, and then a record that says so."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from data_tools.encoders import FAST, Encoder, check, choose_encoder, open_encoder
from data_tools.errors import UserError
from data_tools.indexed import IndexedWriter, best_dtype
from data_tools.manifest import SPLITS, Shard
from data_tools.memory import give_back_memory
from data_tools.parts import Task
from data_tools.pool import Report
from data_tools.readers import Problem, read_part
from data_tools.storage import write_whole
from data_tools.tokenizers import Tokenizer, load_tokenizer

BATCH_BYTES, LARGE_BATCH_BYTES = 1 << 20, 8 << 20  # a batch is larger than the first where one document is
PROBLEMS_KEPT = 20


@dataclass(frozen=True)
class Options:
    """Everything that decides the output besides the text and the tokenizer. ``encoder`` is settled before workers see it: never auto."""

    tokenizer: str
    text_key: str = "text"
    append_eos: bool = True
    prepend_bos: bool = False
    normalize_nfc: bool = False
    validation_fraction: float = 0.0
    seed: int = 0
    on_error: str = "fail"
    dedup: str = "none"
    encoder: str = "auto"
    check_every: int = 10_000


@dataclass
class TaskResult:
    """What a task wrote and counted. ``key`` names the work; ``blocks`` are the checksums of the inputs' blocks, by path."""

    key: str = ""
    shards: dict[str, dict[str, Any]] = field(default_factory=dict)
    blocks: dict[str, list[str]] = field(default_factory=dict)
    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    empty: int = 0
    malformed: int = 0
    duplicates: int = 0
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Plan:
    """The tasks and where their results go. ``keys`` name the tasks' work: a result with another key is of other text or options."""

    tasks: list[Task]
    keys: list[str]
    options: Options
    work: Path

    @property
    def notes(self) -> Path:
        """Folder of everything that is no part of the dataset."""
        return self.work / ".work"

    def record(self, number: int) -> Path:
        """The file that says that a task is done."""
        return self.notes / "records" / f"{number:05d}.json"

    def duplicates(self, number: int) -> Path:
        """Numbers (int64) of a task's documents that were seen before."""
        return self.notes / "duplicates" / f"{number:05d}.bin"


@dataclass(frozen=True)
class Step:
    """Progress since the last report, as differences."""

    size: int = 0
    documents: int = 0
    tokens: int = 0


class _Opened:
    """A tokenizer and encoders for it, each opened once."""

    def __init__(self, path: str) -> None:
        self.tokenizer = load_tokenizer(path)
        self._encoders: dict[str, Encoder] = {}

    def encoder(self, name: str) -> Encoder:
        """The encoder of that name. Raises UserError when it cannot be had."""
        if name not in self._encoders:
            self._encoders[name] = open_encoder(name, self.tokenizer)
        return self._encoders[name]


_warm: list[_Opened] = []  # what a worker opened while its parent was still planning


def warm_up(options: Options) -> None:
    """Opens the tokenizer and the encoder that will most likely be used."""
    opened = _Opened(options.tokenizer)
    opened.encoder(FAST[opened.tokenizer.kind][0] if options.encoder == "auto" else options.encoder)
    _warm.append(opened)
    give_back_memory()


def _opened(options: Options) -> _Opened:
    return _warm[0] if _warm else _Opened(options.tokenizer)


def open_choice(work: tuple[Options, list[bytes]]) -> Callable[[int, Report], tuple[str, str, list[str]]]:
    """A process's function that chooses the encoder by these texts: its name and version, and sentences about those passed over."""
    options, texts = work
    opened = _opened(options)

    def job(_: int, __: Report) -> tuple[str, str, list[str]]:
        encoder, notes = choose_encoder(options.encoder, opened.tokenizer, texts, opened.encoder)
        opened.tokenizer.rest()
        return encoder.name, encoder.version, notes

    return job


def open_tokenize_job(plan: Plan) -> Callable[[int, Report], TaskResult]:
    """A process's function that runs tasks by number."""
    opened = _opened(plan.options)
    encoder = opened.encoder(plan.options.encoder)
    return lambda number, report: _Task(plan, number, opened.tokenizer, encoder, report).run()


def documents(task: Task, options: Options, result: TaskResult, report: Report = lambda _: None, digest: bool = False) -> Iterator[bytes]:
    """The texts of a task (UTF-8), in order, cleaned as the options say; counts empty and malformed ones, and with ``digest`` notes checksums.

    Raises UserError for a malformed record when ``on_error`` is fail.
    """
    for part in task:
        digests: list[str] | None = [] if digest else None
        for text in read_part(part, options.text_key, digests):
            if isinstance(text, Problem):
                _malformed(text, options, result)
            elif not text or text.isspace():
                result.empty += 1
            else:
                data = (unicodedata.normalize("NFC", text) if options.normalize_nfc else text).encode()
                del text  # a document may be large, and both would be held while it is encoded
                yield data
        if digests:
            result.blocks.setdefault(part.path, []).extend(digests)
        report(Step(size=part.size))


def _malformed(problem: Problem, options: Options, result: TaskResult) -> None:
    sentence = f"{problem.place} {problem.what}"
    if options.on_error == "fail":
        raise UserError(f"{sentence}; mend it, or pass --on-error skip to leave such records out")
    result.malformed += 1
    result.problems = [*result.problems, sentence][:PROBLEMS_KEPT]


class _Task:
    """The run of one task."""

    def __init__(self, plan: Plan, number: int, tokenizer: Tokenizer, encoder: Encoder, report: Report) -> None:
        self.plan, self.number, self.options = plan, number, plan.options
        self.tokenizer, self.encoder, self.report = tokenizer, encoder, report
        self.dtype = best_dtype(tokenizer.vocab_size)
        self.eos = _control(tokenizer.eos_id, self.options.append_eos)
        self.bos = _control(tokenizer.bos_id, self.options.prepend_bos)
        self.validation_below = int(self.options.validation_fraction * 2**64)
        self.result = TaskResult(plan.keys[number])
        self.writers: dict[str, IndexedWriter] = {}
        self.bytes_of = dict.fromkeys(SPLITS, 0)
        self.size_left = sum(part.size for part in plan.tasks[number])

    def run(self) -> TaskResult:
        """Writes the shards and, when they are safe on disk, the record."""
        for stale in self.plan.work.glob(f"*/.tmp-*-{self.number:05d}.*"):
            stale.unlink(missing_ok=True)  # of a process that was killed
        try:
            self._write()
            for writer in self.writers.values():
                writer.close()
        except OSError as error:
            self._abort()
            raise UserError(
                f"{self.plan.work} cannot be written ({error.strerror or error}); make room: the same command continues"
            ) from error
        except BaseException:
            self._abort()
            raise
        for split, writer in self.writers.items():
            shard = Shard(f"{split}/{self.number:05d}", writer.documents, writer.tokens, self.dtype.name, writer.xxh3_bin, writer.xxh3_idx)
            shard.text_bytes = self.bytes_of[split]
            self.result.shards[split] = asdict(shard)
        write_whole(self.plan.record(self.number), json.dumps(asdict(self.result)).encode())
        self.report(Step(self.size_left))
        return self.result

    def _abort(self) -> None:
        for writer in self.writers.values():
            writer.abort()

    def _write(self) -> None:
        pending: dict[str, list[bytes]] = {split: [] for split in SPLITS}
        sizes = dict.fromkeys(SPLITS, 0)
        for text, split in self._split_documents():
            pending[split].append(text)
            sizes[split] += len(text)
            if sizes[split] >= BATCH_BYTES:
                self._encode(split, pending[split], sizes[split])
                pending[split], sizes[split] = [], 0
        for split, texts in pending.items():
            if texts:
                self._encode(split, texts, sizes[split])

    def _split_documents(self) -> Iterator[tuple[bytes, str]]:
        """Texts that are no duplicates, each with its split, which depends on the text alone, wherever the document stands."""
        dropped = self._duplicates()
        for number, text in enumerate(documents(self.plan.tasks[self.number], self.options, self.result, digest=True)):
            if number in dropped:
                self.result.duplicates += 1
                continue
            digest = split_hash(text, self.options.seed)
            if digest % self.options.check_every == 0:
                check(self.encoder, self.tokenizer, [text])
            yield text, "validation" if digest < self.validation_below else "train"

    def _duplicates(self) -> set[int]:
        path = self.plan.duplicates(self.number)
        return set(np.fromfile(path, dtype=np.int64).tolist()) if path.is_file() else set()

    def _encode(self, split: str, texts: list[bytes], size: int) -> None:
        if split not in self.writers:
            self.writers[split] = IndexedWriter(self.plan.work / split / f"{self.number:05d}", self.dtype)
        encoded = self.encoder.encode_batch(texts)
        extra = len(self.bos) + len(self.eos)
        lengths = np.fromiter((len(ids) + extra for ids in encoded), dtype=np.int32, count=len(encoded))
        pieces = [piece for ids in encoded for piece in (self.bos, ids, self.eos)] if extra else encoded
        tokens = np.concatenate(pieces, dtype=self.dtype, casting="unsafe")  # ids fit: the dtype is chosen by the vocabulary
        self.writers[split].add(tokens, lengths)
        self.bytes_of[split] += size
        self.result.documents += len(texts)
        self.result.tokens += len(tokens)
        self.result.text_bytes += size
        progressed = min(size, self.size_left)  # of the input, which may be compressed or hold more than text
        self.size_left -= progressed
        self.report(Step(progressed, len(texts), len(tokens)))
        if size > LARGE_BATCH_BYTES:
            give_back_memory()


def _control(token: int | None, wanted: bool) -> np.ndarray:
    return np.array([token] if wanted and token is not None else [], dtype=np.int32)


def split_hash(document: bytes, seed: int) -> int:
    """64 bits that decide a document's split and whether its encoding is checked."""
    return xxhash.xxh3_64_intdigest(document, seed=seed)
