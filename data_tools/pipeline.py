"""Tokenize and pack: many tasks, one shard each; finished shards survive any interruption, and the result does not depend on the workers.

Work happens in ``OUT.partial``. A task writes its shards, forces them to disk and then writes its record, which is believed on a restart if
its key fits the task's text and the options. When all records are there the manifest is written and the folder is published. Several processes,
on several nodes, may share the work by ``Share``; whoever calls ``finish`` last publishes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from data_tools import dedup, folders
from data_tools.errors import UserError
from data_tools.manifest import FILE_NAME, SPLITS, Manifest, Shard, Split, TokenizerInfo
from data_tools.parts import Part, Task
from data_tools.pool import Pool
from data_tools.progress import Progress
from data_tools.storage import combine, is_url, make_durable, stamp, write_whole
from data_tools.tokenizers import Tokenizer, load_tokenizer
from data_tools.worker import Options, Plan, TaskResult, documents, open_choice, open_tokenize_job, warm_up

CHECKED_FIRST = 128 << 10  # bytes of the first documents on which an encoder is compared with the reference
PLAN_FILE = "plan.json"


@dataclass(frozen=True)
class Share:
    """This process's tasks are a contiguous run of all: part ``index`` of ``count``."""

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise UserError(f"task index {self.index} is not among 0 ... {self.count - 1}; check --task-index and --task-count")

    def numbers(self, tasks: int) -> range:
        """Which of so many tasks."""
        return range(tasks * self.index // self.count, tasks * (self.index + 1) // self.count)


def tokenize(
    tasks: list[Task], options: Options, out: Path, workers: int, overwrite: bool = False, share: Share | None = None
) -> Manifest | None:
    """Runs the tasks in ``workers`` processes and writes the dataset folder ``out``; returns its manifest.

    With a ``share`` only that part is done and None is returned: call ``finish`` when all parts are. The same call on a finished dataset changes
    nothing. Raises UserError if ``out`` holds anything else, if a record is malformed (with ``on_error="fail"``), or if there is no document.
    """
    tokenizer = _fitting_tokenizer(options)
    mine = (share or Share()).numbers(len(tasks))
    with Pool(min(workers, len(mine)), warm_up, options) as pool:
        name, version = _chosen_encoder(tasks, options, pool)
        plan = make_plan(tasks, replace(options, encoder=name), version, tokenizer, folders.work_folder(out))
        if (done := _already(plan.work, out, plan_name(plan), overwrite)) is not None:
            return done
        folders.check_free(out, overwrite)
        folders.make(plan.record(0).parent)
        lock = plan.notes / f"lock-{share.index if share else 0}-of-{share.count if share else 1}"
        with folders.lock(lock), _kept_or_removed(plan, share):
            _write_plan(plan, version, tokenizer)
            _run(plan, mine, pool)
            return None if share else _complete(plan, out)


@contextmanager
def _kept_or_removed(plan: Plan, share: Share | None) -> Iterator[None]:
    """After wrong input finished shards stay for the next try, and the error says so; without any the work folder goes."""
    try:
        yield
    except UserError as error:
        kept = len(list(plan.notes.glob("records/*.json")))
        if kept:
            raise UserError(f"{error} ({kept} finished shards are kept in {plan.work} for the next try)") from error
        if not share and not any(plan.notes.glob("hashes/*")):
            shutil.rmtree(plan.work, ignore_errors=True)
        raise


def _fitting_tokenizer(options: Options) -> Tokenizer:
    tokenizer = load_tokenizer(options.tokenizer)
    if options.append_eos and tokenizer.eos_id is None:
        raise UserError(f"tokenizer {options.tokenizer} has no end-of-document token; pass --no-eos, or use one that has")
    if options.prepend_bos and tokenizer.bos_id is None:
        raise UserError(f"tokenizer {options.tokenizer} has no begin-of-document token; leave --bos out, or use one that has")
    return tokenizer


def _chosen_encoder(tasks: list[Task], options: Options, pool: Pool) -> tuple[str, str]:
    """Name and version of the encoder to use. A worker finds out, which has opened one already: this process plans and opens none."""
    ((_, (name, version, notes)),) = pool.run([0], open_choice, (options, _first_documents(tasks, options)), lambda _: None)
    for note in notes:
        print(f"note: {note}; using {version}", file=sys.stderr)
    return name, version


def _first_documents(tasks: list[Task], options: Options) -> list[bytes]:
    """Whole documents until they are enough to compare encoders on; a malformed record ends them (it is reported when its task runs)."""
    texts: list[bytes] = []
    size = 0
    try:
        for task in tasks:
            for text in documents(task, options, TaskResult()):
                texts.append(text)
                size += len(text)
                if size >= CHECKED_FIRST:
                    return texts
    except UserError:
        pass
    return texts


def make_plan(tasks: list[Task], options: Options, encoder_version: str, tokenizer: Tokenizer, work: Path) -> Plan:
    """Names each task's work by everything that decides its output: parts of files with size and time of change, options, tokenizer, encoder."""
    decides = {key: value for key, value in asdict(options).items() if key not in ("tokenizer", "on_error")}
    common = json.dumps([decides, tokenizer.hash, encoder_version], sort_keys=True)
    keys = []
    for task in tasks:
        body = json.dumps([common, [part.identity() for part in task]], sort_keys=True)
        keys.append(hashlib.sha256(body.encode()).hexdigest()[:24])
    return Plan(tasks, keys, options, work)


def plan_name(plan: Plan) -> str:
    """Names the whole work."""
    return hashlib.sha256("".join([*plan.keys, plan.options.on_error]).encode()).hexdigest()[:24]


def _already(work: Path, out: Path, name: str, overwrite: bool) -> Manifest | None:
    """Finishes what a killed process had all but finished; the manifest if there is nothing left to do."""
    if (work / FILE_NAME).is_file() and Manifest.load(work).plan == name:
        folders.publish(work, out)
        return Manifest.load(out)
    if overwrite or not (out / FILE_NAME).is_file():
        return None
    found = Manifest.load(out)
    if found.plan != name:
        return None
    shutil.rmtree(work, ignore_errors=True)
    print(f"{out} is already made of this text with these options; nothing to do", file=sys.stderr)
    return found


def _write_plan(plan: Plan, encoder_version: str, tokenizer: Tokenizer) -> None:
    """What ``finish`` needs to know. Every process of an array writes the same."""
    described = {
        "name": plan_name(plan),
        "encoder_version": encoder_version,
        "command": " ".join(sys.argv),
        "keys": plan.keys,
        "options": asdict(plan.options),
        "inputs": _inputs(plan.tasks),
        "tasks": [[asdict(part) for part in task] for task in plan.tasks],
    }
    write_whole(plan.notes / PLAN_FILE, json.dumps(described).encode())
    tokenizer.save(plan.work / "tokenizer")


def _inputs(tasks: list[Task]) -> list[dict[str, Any]]:
    """A row for each input, in order."""
    rows: list[dict[str, Any]] = []
    for path, part in {part.path: part for task in tasks for part in task}.items():
        if part.kind == "dataset":
            rows.append({"dataset": path, "shards": part.end})
        else:
            rows.append({"path": path if is_url(path) else os.path.abspath(path), **stamp(path)})
    return rows


def _run(plan: Plan, numbers: Sequence[int], pool: Pool) -> None:
    if plan.options.dedup == "exact":
        _mark_duplicates(plan, numbers, pool)
    with Progress("tokenizing", sum(part.size for number in numbers for part in plan.tasks[number])) as progress:
        waiting = []
        for number in numbers:
            if (result := _finished(plan, number)) is None:
                waiting.append(number)
            else:
                progress.skip(sum(part.size for part in plan.tasks[number]), result.documents, result.tokens)
        _finish_jobs(waiting, open_tokenize_job, plan, pool, progress)


def _mark_duplicates(plan: Plan, numbers: Sequence[int], pool: Pool) -> None:
    """Hashes all documents, and lists the duplicates; those lists are part of a task's work, so its record goes if they change."""
    if len(numbers) < len(plan.tasks):
        raise UserError("--dedup needs to see all documents, an array's task sees a part; pass --dedup to `mamba-data merge` instead")
    dedup.hashes_path(plan, 0).parent.mkdir(exist_ok=True)
    waiting = [number for number in numbers if not dedup.hashes_path(plan, number).is_file()]
    with Progress("looking for duplicates", sum(part.size for number in waiting for part in plan.tasks[number])) as progress:
        _finish_jobs(waiting, dedup.open_hash_job, plan, pool, progress)
    before = {number: _content(plan.duplicates(number)) for number in numbers}
    dedup.write_duplicates(plan)
    for number in numbers:
        if _content(plan.duplicates(number)) != before[number]:
            plan.record(number).unlink(missing_ok=True)


def _content(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b""


def _finish_jobs(numbers: Sequence[int], open_job: Any, plan: Plan, pool: Pool, progress: Progress) -> None:
    for _ in pool.run(numbers, open_job, plan, lambda step: progress.add(step.size, step.documents, step.tokens)):
        pass


def _finished(plan: Plan, number: int) -> TaskResult | None:
    """The result of a task that an earlier run finished, if it is of the same work."""
    path = plan.record(number)
    if not path.is_file():
        return None
    result = TaskResult(**json.loads(path.read_bytes()))
    return result if result.key == plan.keys[number] else None


def finish(out: Path) -> Manifest:
    """Publishes a dataset whose tasks were shared among several processes. Raises UserError that names those still to be done."""
    work = folders.work_folder(out)
    path = work / ".work" / PLAN_FILE
    if not path.is_file():
        if (work / FILE_NAME).is_file():
            folders.publish(work, out)
        return Manifest.load(out)
    described = json.loads(path.read_bytes())
    tasks = [[Part(**{**part, "blocks": tuple(part["blocks"])}) for part in task] for task in described["tasks"]]
    plan = Plan(tasks, described["keys"], Options(**described["options"]), work)
    return _complete(plan, out)


def _complete(plan: Plan, out: Path) -> Manifest:
    """Writes the manifest and publishes."""
    results = [_finished(plan, number) for number in range(len(plan.tasks))]
    missing = [number for number, result in enumerate(results) if result is None]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(results)} shards of {out} are not finished (the first is {missing[0]}); run the array's failed tasks again"
        )
    described = json.loads((plan.notes / PLAN_FILE).read_bytes())
    try:
        manifest = _assemble([result for result in results if result is not None], plan, described)
    except UserError:
        shutil.rmtree(plan.work)
        raise
    manifest.save(plan.work)
    folders.publish(plan.work, out)
    return Manifest.load(out)


def _assemble(results: list[TaskResult], plan: Plan, described: dict[str, Any]) -> Manifest:
    splits: dict[str, Split] = {}
    for name in SPLITS:
        shards = [Shard(**result.shards[name]) for result in results if name in result.shards]
        if shards:
            splits[name] = Split(shards)
    names = ("documents", "tokens", "text_bytes", "empty", "malformed", "duplicates")
    counts = {name: sum(getattr(result, name) for result in results) for name in names}
    if "train" not in splits:
        why = (
            f"{counts['empty']} were empty, {counts['malformed']} malformed, {sum(s.documents for s in splits.values())} fell to validation"
        )
        raise UserError(f"the input holds no documents to train on ({why}); check the paths, --text-key and --validation-fraction")
    _remove_leftovers(plan.work, splits)
    tokenizer = load_tokenizer(plan.work / "tokenizer")
    info = TokenizerInfo(tokenizer.kind, tokenizer.hash, tokenizer.vocab_size, tokenizer.eos_id, tokenizer.bos_id)
    info.encoder, info.encoder_version = plan.options.encoder, described["encoder_version"]
    info.files = [path.name for path in tokenizer.files]
    policies = {key: value for key, value in asdict(plan.options).items() if key not in ("tokenizer", "encoder")}
    policies |= {"special_tokens_in_text": "text", "empty_documents": "dropped"}
    if problems := [problem for result in results for problem in result.problems]:
        policies["problems"] = problems[:20]
    versions = {"tokenizer": tokenizer.version, "encoder": described["encoder_version"], "numpy": np.__version__}
    versions["python"] = sys.version.split()[0]
    inputs = _with_checksums(described["inputs"], plan.tasks, results)
    return Manifest(info, splits, policies, inputs, counts, described["command"], versions, described["name"])


def _with_checksums(inputs: list[dict[str, Any]], tasks: list[Task], results: list[TaskResult]) -> list[dict[str, Any]]:
    """Adds to each input file the checksum of what was read: its parts, in order, brought the blocks."""
    blocks: dict[str, list[str]] = {}
    for result in results:
        for path, digests in result.blocks.items():
            blocks.setdefault(path, []).extend(digests)
    paths = dict.fromkeys(part.path for task in tasks for part in task)
    rows = []
    for path, row in zip(paths, inputs, strict=True):
        rows.append({**row, "xxh3": combine(blocks[path])} if blocks.get(path) else row)
    return rows


def _remove_leftovers(work: Path, splits: dict[str, Split]) -> None:
    """Shards and temporary files of killed processes and of tasks that are no longer, and manifests that such were writing."""
    for unfinished in work.glob(f".tmp-*-{FILE_NAME}"):
        unfinished.unlink()
    wanted = {f"{shard.path}{suffix}" for split in splits.values() for shard in split.shards for suffix in (".bin", ".idx")}
    for name in SPLITS:
        if (work / name).is_dir():
            for path in (work / name).iterdir():
                if f"{name}/{path.name}" not in wanted:
                    path.unlink()
            if name not in splits:
                (work / name).rmdir()
            else:
                make_durable(work / name)
