"""The pipeline: what it writes is a function of the text and the options alone."""

from __future__ import annotations

import json
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import orjson
import pytest

from data_tools import pipeline, worker
from data_tools.encoders import FastEncoder
from data_tools.errors import UserError
from data_tools.indexed import IndexedDataset
from data_tools.manifest import Manifest
from data_tools.pipeline import Share, finish, tokenize
from data_tools.sources import find_files, plan_tasks
from data_tools.storage import file_hash
from data_tools.tokenizers import load_tokenizer
from data_tools.worker import Options


@pytest.fixture
def corpus(tmp_path, texts, write_jsonl) -> Path:
    """One JSONL that is cut into many tasks."""
    return write_jsonl(tmp_path / "corpus.jsonl", texts)


def plan(*paths: Path) -> list:
    return plan_tasks(find_files([str(path) for path in paths], [], []))


def documents(folder: Path, split: str) -> list[list[int]]:
    found = []
    for shard in Manifest.load(folder).splits[split].shards:
        data = IndexedDataset(folder / shard.path)
        found += [data[i].tolist() for i in range(len(data))]
    return found


@pytest.mark.parametrize("kind", ["sentencepiece", "hf"])
@pytest.mark.usefixtures("small_tasks")
def test_every_document_comes_out_once_in_order_with_its_end(tmp_path, corpus, texts, tokenizers, kind):
    tasks = plan(corpus)
    assert len(tasks) > 5
    manifest = tokenize(tasks, Options(str(tokenizers[kind])), tmp_path / "out", 1)
    tokenizer = load_tokenizer(tokenizers[kind])
    expected = [[*ids.tolist(), tokenizer.eos_id] for ids in tokenizer.encode_batch(texts)]
    assert documents(tmp_path / "out", "train") == expected
    assert manifest.tokenizer.encoder == "gigatoken"
    assert manifest.counts["documents"] == len(texts)
    assert manifest.splits["train"].tokens == sum(map(len, expected))
    assert manifest.splits["train"].text_bytes == sum(len(text.encode()) for text in texts)
    assert manifest.inputs[0]["xxh3"] == file_hash(str(corpus))


@pytest.mark.usefixtures("small_tasks")
def test_bos_eos_nfc_and_empty_documents(tmp_path, tokenizers, write_jsonl):
    source = write_jsonl(tmp_path / "a.jsonl", ["cafe\u0301", "", " \n\t", "b"])
    tokenizer = load_tokenizer(tokenizers["sentencepiece"])
    options = Options(str(tokenizers["sentencepiece"]), prepend_bos=True, append_eos=False, normalize_nfc=True)
    manifest = tokenize(plan(source), options, tmp_path / "out", 1)
    nfc = unicodedata.normalize("NFC", "cafe\u0301")
    assert documents(tmp_path / "out", "train") == [[tokenizer.bos_id, *tokenizer.encode(text)] for text in (nfc, "b")]
    assert (manifest.counts["empty"], manifest.counts["documents"]) == (2, 2)


@pytest.mark.usefixtures("small_tasks")
def test_output_does_not_depend_on_workers_or_on_the_encoder(tmp_path, corpus, tokenizers, checksums):
    found = []
    for workers, encoder in ((1, "auto"), (2, "auto"), (3, "auto"), (1, "fastokens"), (1, "reference")):
        out = tmp_path / f"{workers}-{encoder}"
        manifest = tokenize(plan(corpus), Options(str(tokenizers["hf"]), validation_fraction=0.1, encoder=encoder), out, workers)
        found.append((checksums(out), manifest.fingerprint))
    assert len(found[0][0]) > 10
    assert all(one == found[0] for one in found)


@pytest.mark.usefixtures("small_tasks")
def test_the_validation_split_is_stable_under_resharding(tmp_path, texts, tokenizers, write_jsonl):
    whole = write_jsonl(tmp_path / "whole.jsonl", texts)
    parts = [write_jsonl(tmp_path / f"parts/{i}.jsonl", texts[i::3]) for i in (2, 0, 1)]
    options = Options(str(tokenizers["sentencepiece"]), validation_fraction=0.2, seed=5)
    tokenize(plan(whole), options, tmp_path / "a", 1)
    tokenize(plan(*parts), options, tmp_path / "b", 1)
    a, b = (sorted(documents(tmp_path / name, "validation")) for name in "ab")
    assert a == b
    assert 0.1 < len(a) / len(texts) < 0.3


@pytest.mark.usefixtures("small_tasks")
def test_a_finished_dataset_is_not_made_again_and_not_lost(tmp_path, corpus, tokenizers, checksums, capsys):
    options = Options(str(tokenizers["sentencepiece"]))
    tokenize(plan(corpus), options, tmp_path / "out", 1)
    before = checksums(tmp_path / "out")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    tokenize(plan(corpus), options, tmp_path / "out", 1)
    assert "nothing to do" in capsys.readouterr().err
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    other = Options(str(tokenizers["sentencepiece"]), prepend_bos=True)
    with pytest.raises(UserError, match="--overwrite"):
        tokenize(plan(corpus), other, tmp_path / "out", 1)
    assert checksums(tmp_path / "out") == before
    tokenize(plan(corpus), other, tmp_path / "out", 1, overwrite=True)
    assert checksums(tmp_path / "out") != before
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.usefixtures("small_tasks")
def test_strangers_files_are_never_overwritten(tmp_path, corpus, tokenizers):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match=r"thesis\.tex"):
        tokenize(plan(corpus), Options(str(tokenizers["sentencepiece"])), tmp_path / "out", 1, overwrite=True)
    assert (tmp_path / "out" / "thesis.tex").read_text() == "precious"


@pytest.mark.usefixtures("small_tasks")
def test_after_a_failure_only_unfinished_shards_are_made(tmp_path, texts, tokenizers, write_jsonl, checksums, monkeypatch):
    """A bad record late in the input: what was finished before is kept, and mending the record costs one shard."""
    files = [write_jsonl(tmp_path / f"{i}.jsonl", (["".join(texts)[i * 50_000 :][:1000]] * 100)) for i in range(4)]
    good = files[2].read_bytes()
    files[2].write_bytes(good + b'{"text": 3}\n')
    options = Options(str(tokenizers["sentencepiece"]))
    assert len(plan(*files)) == len(files)
    with pytest.raises(UserError, match=r"2\.jsonl, line 101 holds a number.*2 finished shards are kept"):
        tokenize(plan(*files), options, tmp_path / "out", 1)
    assert not (tmp_path / "out").exists()
    files[2].write_bytes(good)
    (tmp_path / "out.partial" / ".tmp-1-manifest.json").write_text("{")  # as a process that is killed while it writes leaves it
    made = []
    run = worker._Task.run
    monkeypatch.setattr(worker._Task, "run", lambda task: made.append(task.number) or run(task))
    tokenize(plan(*files), options, tmp_path / "out", 1)
    assert made == [2, 3]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["manifest.json", "tokenizer", "train"]
    tokenize(plan(*files), options, tmp_path / "fresh", 1)
    assert checksums(tmp_path / "out") == checksums(tmp_path / "fresh")


@pytest.mark.usefixtures("small_tasks")
def test_an_array_of_tasks_gives_the_bytes_of_one_run(tmp_path, corpus, tokenizers, checksums):
    options = Options(str(tokenizers["sentencepiece"]), validation_fraction=0.1)
    tokenize(plan(corpus), options, tmp_path / "one", 1)
    (tmp_path / "many" / "logs").mkdir(parents=True)  # as a batch system leaves it
    for index in (2, 0):
        assert tokenize(plan(corpus), options, tmp_path / "many", 1, share=Share(index, 3)) is None
    with pytest.raises(UserError, match="not finished"):
        finish(tmp_path / "many")
    tokenize(plan(corpus), options, tmp_path / "many", 1, share=Share(1, 3))
    manifest = finish(tmp_path / "many")
    assert checksums(tmp_path / "many") == checksums(tmp_path / "one")
    assert manifest.fingerprint == Manifest.load(tmp_path / "one").fingerprint
    assert finish(tmp_path / "many").fingerprint == manifest.fingerprint
    assert not (tmp_path / "many.partial").exists()


def test_a_share_outside_the_array_is_refused():
    with pytest.raises(UserError, match="task index 3"):
        Share(3, 3)
    assert [n for i in range(4) for n in Share(i, 4).numbers(10)] == list(range(10))


@pytest.mark.usefixtures("small_tasks")
def test_two_processes_do_not_write_one_dataset(tmp_path, corpus, tokenizers):
    from data_tools import folders

    (tmp_path / "out.partial" / ".work").mkdir(parents=True)
    with folders.lock(tmp_path / "out.partial" / ".work" / "lock-0-of-1"), pytest.raises(UserError, match="another process"):
        tokenize(plan(corpus), Options(str(tokenizers["sentencepiece"])), tmp_path / "out", 1)


def test_malformed_records_are_skipped_counted_and_named(tmp_path, tokenizers):
    source = tmp_path / "a.jsonl"
    source.write_bytes(b'{"text": "one"}\nnot json\n\n{"text": null}\n{"body": "x"}\n{"text": "two"}\n')
    options = Options(str(tokenizers["sentencepiece"]), on_error="skip")
    manifest = tokenize(plan(source), options, tmp_path / "out", 1)
    assert (manifest.counts["documents"], manifest.counts["malformed"]) == (2, 3)
    places = [problem.partition(".jsonl, ")[2][:6] for problem in manifest.policies["problems"]]
    assert places == ["line 2", "line 4", "line 5"]


@pytest.mark.usefixtures("small_tasks")
def test_line_numbers_are_right_in_every_range_of_a_file(tmp_path, texts, tokenizers):
    lines = [orjson.dumps({"text": text}) for text in texts]
    bad = [3, len(lines) // 2, len(lines) - 2]
    for number in bad:
        lines[number] = b"{broken"
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    options = Options(str(tokenizers["sentencepiece"]), on_error="skip")
    manifest = tokenize(plan(tmp_path / "a.jsonl"), options, tmp_path / "out", 2)
    assert [int(p.partition(", line ")[2].split()[0]) for p in manifest.policies["problems"]] == [number + 1 for number in bad]


@pytest.mark.usefixtures("small_tasks")
def test_exact_duplicates_are_dropped_whatever_the_workers(tmp_path, texts, tokenizers, write_jsonl, checksums):
    twice = [*texts, *texts[::7], texts[0]]
    source = write_jsonl(tmp_path / "a.jsonl", twice)
    options = Options(str(tokenizers["sentencepiece"]), dedup="exact")
    unique = list(dict.fromkeys(texts))
    for workers in (1, 2):
        manifest = tokenize(plan(source), options, tmp_path / str(workers), workers)
        assert manifest.counts["duplicates"] == len(twice) - len(unique)
    assert checksums(tmp_path / "1") == checksums(tmp_path / "2")
    eos = load_tokenizer(tokenizers["sentencepiece"]).eos_id
    expected = [[*ids.tolist(), eos] for ids in load_tokenizer(tokenizers["sentencepiece"]).encode_batch(unique)]
    assert documents(tmp_path / "1", "train") == expected


def test_a_fast_encoder_that_errs_is_passed_over_or_stops_the_run(tmp_path, tokenizers, write_jsonl, monkeypatch, capsys):
    """First documents decide what ``auto`` takes; a later difference, met in the sample, ends the run with a clear word."""
    source = write_jsonl(tmp_path / "a.jsonl", ["first " * 60_000, "the rare case"])
    encode = FastEncoder.encode_batch

    def wrong(self, texts):
        encoded = encode(self, texts)
        return [np.zeros(1, np.int32) if b"rare" in text else ids for text, ids in zip(texts, encoded, strict=True)]

    monkeypatch.setattr(FastEncoder, "encode_batch", wrong)
    options = Options(str(tokenizers["sentencepiece"]), check_every=1)
    with pytest.raises(UserError, match=r"gives other ids than sentencepiece.*'the rare case'; pass --encoder reference"):
        tokenize(plan(source), options, tmp_path / "out", 1)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()
    early = write_jsonl(tmp_path / "b.jsonl", ["the rare case", "and more"])
    manifest = tokenize(plan(early), options, tmp_path / "out", 1)
    assert manifest.tokenizer.encoder == "reference"
    assert "using sentencepiece" in capsys.readouterr().err


@pytest.mark.usefixtures("small_tasks")
def test_publishing_survives_a_kill_at_every_step(tmp_path, texts, write_jsonl, tokenizers, checksums, monkeypatch):
    """Each call that changes the disk while a dataset replaces another is, in turn, the last one before the process dies."""
    corpus = write_jsonl(tmp_path / "corpus.jsonl", texts[:60])
    new, old = (
        Options(str(tokenizers["sentencepiece"]), prepend_bos=True),
        Options(str(tokenizers["sentencepiece"]), validation_fraction=0.2),
    )
    tokenize(plan(corpus), new, tmp_path / "expected", 1)
    tokenize(plan(corpus), old, tmp_path / "old", 1)

    class Killed(BaseException):
        pass

    def tokenize_until(step: int) -> bool:
        left = step

        def mortal(function):
            def call(*arguments, **options):
                nonlocal left
                if str(arguments[0]).startswith(str(tmp_path / "out")):
                    left -= 1
                    if left < 0:
                        raise Killed
                return function(*arguments, **options)

            return call

        with monkeypatch.context() as patch:
            patch.setattr(pipeline.folders.os, "replace", mortal(pipeline.folders.os.replace))
            patch.setattr(pipeline.folders.shutil, "rmtree", mortal(shutil.rmtree))
            patch.setattr(Path, "unlink", mortal(Path.unlink))
            try:
                tokenize(plan(corpus), new, tmp_path / "out", 1, overwrite=True)
            except Killed:
                return False
            return True

    steps = 0
    while True:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        shutil.rmtree(tmp_path / "out.partial", ignore_errors=True)
        shutil.copytree(tmp_path / "old", tmp_path / "out")
        whole = tokenize_until(steps)
        if (tmp_path / "out" / "manifest.json").exists():
            found = checksums(tmp_path / "out")
            assert found in (checksums(tmp_path / "old"), checksums(tmp_path / "expected"))
        tokenize(plan(corpus), new, tmp_path / "out", 1, overwrite=True)
        assert checksums(tmp_path / "out") == checksums(tmp_path / "expected")
        assert not (tmp_path / "out" / "validation").exists()
        assert not (tmp_path / "out.partial").exists()
        if whole:
            break
        steps += 1
    assert steps > 8


def test_the_manifest_says_where_everything_came_from(tmp_path, corpus, tokenizers):
    tokenize(plan(corpus), Options(str(tokenizers["hf"])), tmp_path / "out", 1)
    body = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert body["inputs"][0]["path"] == str(corpus)
    assert body["inputs"][0]["size"] == corpus.stat().st_size
    assert body["policies"]["special_tokens_in_text"] == "text"
    assert body["tokenizer"]["encoder_version"].startswith("gigatoken ")
    assert body["versions"]["tokenizer"].startswith("tokenizers ")
    assert body["command"]
    assert body["fingerprint"] == Manifest.load(tmp_path / "out").fingerprint
