"""Readers: the same documents from every kind of file, each once however the file is cut."""

from __future__ import annotations

import gzip
import itertools
from pathlib import Path

import orjson
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.errors import UserError
from data_tools.parts import Part
from data_tools.readers import Problem, read_part
from data_tools.sources import find_files, plan_datasets, plan_tasks
from data_tools.storage import combine, file_hash, open_decompressed


def read(tasks: list, key: str = "text") -> list:
    return [text for task in tasks for part in task for text in read_part(part, key)]


def plan(path: Path, kind: str | None = None) -> list:
    return plan_tasks(find_files([str(path)], [], []), kind)


def jsonl(texts: list[str]) -> bytes:
    return b"".join(orjson.dumps({"text": text, "meta": {"body": text}, "n": 1}) + b"\n" for text in texts)


def write_parquet(path: Path, texts: list[str]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"text": texts, "meta": [{"body": text} for text in texts], "n": list(range(len(texts)))})
    pq.write_table(table, path, row_group_size=50)


def write_arrow(path: Path, texts: list[str], stream: bool) -> None:
    import pyarrow as pa

    table = pa.table({"text": texts, "meta": [{"body": text} for text in texts]})
    new = pa.ipc.new_stream if stream else pa.ipc.new_file
    with pa.OSFile(str(path), "wb") as sink, new(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=64)


WRITERS = {
    "a.jsonl": lambda path, texts: path.write_bytes(jsonl(texts)),
    "a.json": lambda path, texts: path.write_bytes(b"\xef\xbb\xbf" + jsonl(texts).replace(b"\n", b"\r\n\n").strip()),
    "a.jsonl.gz": lambda path, texts: path.write_bytes(gzip.compress(jsonl(texts[:9])) + gzip.compress(jsonl(texts[9:]))),
    "a.jsonl.zst": lambda path, texts: path.write_bytes(zstandard.compress(jsonl(texts[:9])) + zstandard.compress(jsonl(texts[9:]))),
    "a.parquet": write_parquet,
    "a.arrow": lambda path, texts: write_arrow(path, texts, stream=True),
    "b.arrow": lambda path, texts: write_arrow(path, texts, stream=False),
}


@pytest.mark.parametrize("key", ["text", "meta.body"])
@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.usefixtures("small_tasks")
def test_every_kind_gives_the_same_documents(tmp_path, texts, name, key):
    WRITERS[name](tmp_path / name, texts)
    tasks = plan(tmp_path / name)
    assert read(tasks, key) == texts
    assert len(tasks) == 1 or name in ("a.jsonl", "a.json", "a.parquet")
    digests: list[str] = []
    for task in tasks:
        for part in task:
            list(read_part(part, key, digests))
    assert combine(digests) == file_hash(str(tmp_path / name))


@pytest.mark.parametrize("name", ["a.txt", "b.md.gz", "c.py.zst", "noending"])
def test_a_text_file_is_a_document(tmp_path, name):
    data = "\ufeffline one\r\nline twö\n".encode()
    packed = {".gz": gzip.compress, ".zst": zstandard.compress}.get(Path(name).suffix, bytes)(data)
    (tmp_path / name).write_bytes(packed)
    assert read(plan(tmp_path)) == ["line one\r\nline twö\n"]


@settings(max_examples=60, deadline=None)
@given(
    lines=st.lists(st.sampled_from(["", "a", "bb" * 30, "é\u2028"]), max_size=30),
    cuts=st.lists(st.integers(0, 2000), max_size=5),
    tail=st.booleans(),
)
def test_however_a_file_is_cut_each_line_is_read_once(tmp_path_factory, lines, cuts, tail):
    path = tmp_path_factory.mktemp("cuts") / "a.jsonl"
    data = b"\n".join(orjson.dumps({"text": line}) for line in lines) + (b"\n" if tail else b"")
    path.write_bytes(data)
    edges = sorted({0, len(data), *(min(cut, len(data)) for cut in cuts)})
    parts = [Part(str(path), "jsonl", b - a, a, b) for a, b in itertools.pairwise(edges)]
    assert read([parts]) == lines


def test_a_datasets_folder_and_a_saved_dataset(tmp_path, texts):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"text": texts, "meta": [{"body": text} for text in texts]})
    rows.save_to_disk(tmp_path / "saved", num_shards=2)
    (tmp_path / "folder").mkdir()
    for number in range(2):
        rows.shard(2, number, contiguous=True).to_parquet(tmp_path / "folder" / f"{number}.parquet")
    assert read(plan_datasets([str(tmp_path / "saved")])) == texts
    assert read(plan_datasets([str(tmp_path / "saved")]), "meta.body") == texts
    tasks = plan_datasets([f"{tmp_path / 'folder'}::train"])
    assert len(tasks) == 2
    assert read(tasks) == texts
    (problem, *_) = read(tasks, "nothing")
    assert isinstance(problem, Problem)
    assert "row 1" in problem.place


def test_urls_are_read_through_fsspec(texts):
    import fsspec

    fsspec.filesystem("memory").pipe_file("/bucket/deep/a.jsonl", jsonl(texts[:20]))
    fsspec.filesystem("memory").pipe_file("/bucket/b.jsonl.gz", gzip.compress(jsonl(texts[20:40])))
    for source in ("memory://bucket", "memory://bucket/**"):
        tasks = plan_tasks(find_files([source], [], []))
        assert sorted(read(tasks)) == sorted(texts[:40])


def test_a_file_url_is_the_path_that_it_names(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(["x"]))
    assert find_files([f"file://{tmp_path}/a.jsonl"], [], []) == [str(tmp_path / "a.jsonl")]


def test_what_a_store_refuses_is_one_sentence(monkeypatch):
    import fsspec

    def refuse(*_, **__):
        raise RuntimeError("no credentials\nmore words")

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "find", refuse)
    with pytest.raises(UserError, match=r"memory://bucket cannot be reached \(no credentials\); check"):
        find_files(["memory://bucket"], [], [])


def test_a_zstd_file_that_ends_between_frames_is_whole(tmp_path):
    (tmp_path / "a.zst").write_bytes(zstandard.compress(b"one") + zstandard.compress(b"two"))
    with open_decompressed(str(tmp_path / "a.zst")) as file:
        assert file.read() == b"onetwo"
