"""Malformed input: each gives one clear sentence, exit code 2, and leaves nothing behind."""

from __future__ import annotations

import gzip
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import zstandard


class Case(NamedTuple):
    """``make(folder)`` plants the fault and returns the input; the sentence must hold all of ``said``."""

    make: Callable[[Path], Path]
    said: tuple[str, ...]
    options: tuple[str, ...] = ()


def file(name: str, data: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(data)
        return folder / name

    return make


def folder_without_text(folder: Path) -> Path:
    (folder / "empty").mkdir()
    (folder / "empty" / "picture.png").write_bytes(b"\x89PNG")
    return folder / "empty"


def parquet(columns: dict) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table(columns), folder / "a.parquet")
        return folder / "a.parquet"

    return make


def damaged_parquet(folder: Path) -> Path:
    path = parquet({"text": ["x" * 1000, "y"]})(folder)
    path.write_bytes(path.read_bytes()[:-10])
    return path


def damaged_parquet_page(folder: Path) -> Path:
    path = parquet({"text": ["abc" * 1000, "y"]})(folder)
    data = bytearray(path.read_bytes())
    data[4:60] = b"\xff" * 56
    path.write_bytes(data)
    return path


def arrow_without_column(folder: Path) -> Path:
    import pyarrow as pa

    with pa.OSFile(str(folder / "a.arrow"), "wb") as sink, pa.ipc.new_stream(sink, pa.schema([("body", pa.string())])) as writer:
        writer.write_batch(pa.record_batch({"body": ["x"]}))
    return folder / "a.arrow"


LINE = b'{"text": "good"}\n'
ZSTD = zstandard.compress(LINE * 1000)
INPUTS = {
    "no such file": Case(lambda folder: folder / "nowhere.txt", ("nowhere.txt does not exist",)),
    "no such glob": Case(lambda folder: folder / "*.jsonl", ("*.jsonl does not exist",)),
    "folder without text": Case(folder_without_text, ("empty holds no text",)),
    "empty file": Case(file("a.txt", b""), ("no documents", "1 were empty")),
    "only blanks": Case(file("a.jsonl", b'{"text": "  \\n"}\n\n'), ("no documents", "1 were empty")),
    "text that is not UTF-8": Case(file("a.txt", b"caf\xe9"), ("a.txt is not UTF-8 at byte 3",)),
    "UTF-16 text": Case(file("a.txt", "text".encode("utf-16")), ("a.txt is not UTF-8 at byte 0",)),
    "broken JSON": Case(file("a.jsonl", LINE + b'{"text": "cut'), ("a.jsonl, line 2 is not a JSON object",)),
    "pretty-printed JSON": Case(file("a.json", b'{\n  "text": "x"\n}\n'), ("a.json, line 1 is not a JSON object",)),
    "JSON array": Case(file("a.json", b'["x", "y"]\n'), ("line 1 holds a list where an object",)),
    "no such key": Case(file("a.jsonl", b'{"body": "x", "id": 1}\n'), ("line 1 has no key 'text'", "it has: body, id", "--text-key")),
    "null text": Case(file("a.jsonl", LINE + b'{"text": null}\n'), ("line 2 holds null under 'text'",)),
    "number for text": Case(file("a.jsonl", b'{"text": 5}\n'), ("line 1 holds a number under 'text'",)),
    "list for text": Case(file("a.jsonl", b'{"text": ["x"]}\n'), ("line 1 holds a list under 'text'",)),
    "nested key missing": Case(file("a.jsonl", b'{"a": {"b": "x"}}\n'), ("no key 'a.c'", "it has: b"), ("--text-key", "a.c")),
    "lone surrogate": Case(file("a.jsonl", LINE + b'{"text": "\\ud800"}\n'), ("a.jsonl, line 2",)),
    "JSONL that is not UTF-8": Case(file("a.jsonl", b'{"text": "caf\xe9"}\n'), ("a.jsonl, line 1",)),
    "cut gzip": Case(file("a.jsonl.gz", gzip.compress(LINE * 1000)[:-20]), ("a.jsonl.gz cannot be read after line",)),
    "gzip that is none": Case(file("a.jsonl.gz", LINE), ("a.jsonl.gz cannot be read",)),
    "cut zstd": Case(file("a.jsonl.zst", ZSTD[:-4]), ("a.jsonl.zst cannot be read after line", "ends within a compressed frame")),
    "zstd that is none": Case(file("a.txt.zst", LINE), ("a.txt.zst cannot be read",)),
    "cut Parquet": Case(damaged_parquet, ("a.parquet is not a Parquet file, or is damaged",)),
    "damaged Parquet page": Case(damaged_parquet_page, ("a.parquet cannot be read after row 0",)),
    "Parquet without the column": Case(parquet({"body": ["x"], "id": [1]}), ("has no column 'text' (it has: body, id)",)),
    "Parquet with a null": Case(parquet({"text": ["x", None]}), ("a.parquet, row 2 holds null",)),
    "Parquet with numbers": Case(parquet({"text": [1, 2]}), ("a.parquet, row 1 holds a number",)),
    "Arrow that is none": Case(file("a.arrow", b"not arrow at all"), ("a.arrow cannot be read as Arrow",)),
    "Arrow without the column": Case(arrow_without_column, ("has no column 'text' (it has: body)",)),
    "all documents to validation": Case(
        lambda folder: file("a.jsonl", b'{"text": "1"}\n')(folder),
        ("no documents to train on", "1 fell to validation"),
        ("--validation-fraction", "0.5", "--seed", "0"),
    ),
    "a dataset that cannot be loaded": Case(lambda folder: folder / "none", ("none cannot be loaded",), ("--datasets",)),
    "an unknown protocol": Case(lambda folder: Path("nosuch://bucket/a.jsonl"), ("cannot be opened", "nosuch")),
}


@pytest.mark.parametrize("name", INPUTS)
def test_malformed_input(name, tmp_path, tokenizers, mamba_data):
    case = INPUTS[name]
    source = str(case.make(tmp_path)).replace("nosuch:/", "nosuch://").replace(":///", "://")
    result = mamba_data("tokenize", source, "--tokenizer", tokenizers["sentencepiece"], "--output", tmp_path / "out", *case.options)
    assert_one_sentence(result, *case.said)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def assert_one_sentence(result, *said: str) -> None:
    assert result.code == 2, result.out + result.err
    errors = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.err
    assert "Traceback" not in result.err
    assert all(part in errors[0] for part in said), errors[0]


def truncated_model(folder: Path, good: Path) -> Path:
    (folder / "tokenizer.model").write_bytes((good / "tokenizer.model").read_bytes()[:100])
    return folder / "tokenizer.model"


def no_end_token(folder: Path, good: Path) -> Path:
    described = json.loads((good.parent / "hf" / "tokenizer.json").read_text())
    described["added_tokens"] = []
    described["model"]["vocab"] = {t.replace("endoftext", "nothing"): i for t, i in described["model"]["vocab"].items()}
    (folder / "tokenizer.json").write_text(json.dumps(described))
    return folder


TOKENIZERS = {
    "no such tokenizer": (lambda folder, good: folder / "none", "does not exist"),
    "folder without a tokenizer": (lambda folder, good: folder, "holds neither"),
    "truncated model": (truncated_model, "is not a SentencePiece model"),
    "JSON that is no tokenizer": (lambda folder, good: file("tokenizer.json", b"{}")(folder), "is not a tokenizer.json"),
    "no end token": (no_end_token, "has no end-of-document token"),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_malformed_tokenizer(name, tmp_path, tokenizers, mamba_data):
    make, said = TOKENIZERS[name]
    (tmp_path / "t").mkdir()
    source = file("a.txt", b"text")(tmp_path)
    result = mamba_data("tokenize", source, "--tokenizer", make(tmp_path / "t", tokenizers["sentencepiece"]), "--output", tmp_path / "out")
    assert_one_sentence(result, said)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def raw(dtype: str, *ids: int) -> bytes:
    return np.array(ids, dtype=dtype).tobytes()


def datatrove(ends: list[int]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / "a.ds.index").write_bytes(struct.pack(f"<{len(ends)}Q", *ends))
        return file("a.ds", raw("uint16", 5, 6, 7))(folder)

    return make


def damaged_numpy(folder: Path) -> Path:
    np.save(folder / "a.npy", np.arange(100))
    return file("a.npy", (folder / "a.npy").read_bytes()[:-8])(folder)


def float_numpy(folder: Path) -> Path:
    np.save(folder / "a.npy", np.ones(3))
    return folder / "a.npy"


IMPORTS = {
    "no such file": Case(lambda folder: folder / "none.npy", ("none.npy does not exist",)),
    "raw without a dtype": Case(file("a.bin", raw("uint16", 1)), ("a.bin does not say how", "--dtype")),
    "half an id": Case(file("a.bin", b"abc"), ("no whole number of uint16 ids",), ("--dtype", "uint16")),
    "id outside the vocabulary": Case(file("a.bin", raw("uint16", 1, 60000)), ("the id 60000, outside",), ("--dtype", "uint16")),
    "negative id": Case(file("a.bin", raw("int32", 1, -4)), ("the id -4, outside",), ("--dtype", "int32")),
    "no tokens": Case(file("a.bin", b""), ("holds no tokens",), ("--dtype", "uint16")),
    "no such dtype": Case(file("a.bin", b"ab"), ("float99 is no way to store ids",), ("--dtype", "float99")),
    "cut .npy": Case(damaged_numpy, ("is not an array that numpy.save wrote",)),
    ".npy of fractions": Case(float_numpy, ("holds float64 values",)),
    ".ds without its index": Case(file("a.ds", raw("uint16", 1)), ("a.ds.index does not exist",)),
    ".ds that ends elsewhere": Case(datatrove([2]), ("ends at token 2, but", "holds 3")),
    ".ds whose index goes back": Case(datatrove([2, 1, 3]), ("a.ds.index",)),
    "cut .idx": Case(file("a.idx", b"MMIDIDX"), ("a.bin does not exist",)),
}


@pytest.mark.parametrize("name", IMPORTS)
def test_malformed_token_files(name, tmp_path, tokenizers, mamba_data):
    case = IMPORTS[name]
    result = mamba_data(
        "import", case.make(tmp_path), "--tokenizer", tokenizers["sentencepiece"], "--output", tmp_path / "out", *case.options
    )
    assert_one_sentence(result, *case.said)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def manifest_edit(key: str, value: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        body = json.loads((folder / "manifest.json").read_text())
        body[key] = value
        (folder / "manifest.json").write_text(json.dumps(body))

    return edit


DATASETS = {
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "holds no manifest.json"),
    "cut manifest": (lambda folder: (folder / "manifest.json").write_text("{"), "is damaged"),
    "another format": (manifest_edit("format", 99), "another version of this format"),
    "edited manifest": (manifest_edit("splits", {}), "changed by hand"),
    "no tokenizer": (lambda folder: shutil.rmtree(folder / "tokenizer"), "does not exist"),
}


@pytest.mark.parametrize("name", DATASETS)
def test_malformed_dataset(name, tmp_path, tokenizers, mamba_data):
    source = file("a.txt", b"some text")(tmp_path)
    assert mamba_data("tokenize", source, "--tokenizer", tokenizers["sentencepiece"], "--output", tmp_path / "data").code == 0
    damage, said = DATASETS[name]
    damage(tmp_path / "data")
    for command in (["verify"], ["stats"], ["inspect"], ["merge", "--output", tmp_path / "out"]):
        result = mamba_data(command[0], tmp_path / "data", *command[1:])
        assert_one_sentence(result, said)
    assert not (tmp_path / "out").exists()


def test_wrong_options(tmp_path, tokenizers, mamba_data):
    source = file("a.txt", b"some text")(tmp_path)
    tokenizer = ["--tokenizer", tokenizers["sentencepiece"]]
    out = ["--output", tmp_path / "out"]
    (tmp_path / "a-file").write_text("x")
    for arguments, said in (
        (["tokenize", *tokenizer, *out], "no input is named"),
        (["tokenize", "-", "-", *tokenizer, *out], "stdin is named twice"),
        (["tokenize", "--files-from", tmp_path / "none", *tokenizer, *out], "file list"),
        (["tokenize", source, *tokenizer, *out, "--task-index", "1"], "belong together"),
        (["tokenize", source, *tokenizer, *out, "--task-index", "2", "--task-count", "2"], "task index 2"),
        (["tokenize", source, *tokenizer, "--output", tmp_path / "a-file"], "a-file is a file"),
        (["tokenize", source, *tokenizer, "--output", tmp_path / "a-file" / "out"], "cannot be made"),
        (["tokenize", source, *tokenizer, *out, "--encoder", "fastokens"], "does not know tokenizers of kind sentencepiece"),
        (["tokenize", source, *tokenizer, "--output", "s3://bucket/out"], "s3:/bucket/out is a URL"),
        (["train-tokenizer", source, "--output", "s3://bucket/out"], "s3:/bucket/out is a URL"),
        (["train-tokenizer", source, *out, "--vocab-size", "5000"], "a vocabulary of 5000 cannot be trained"),
        (["merge", tmp_path / "none"], "is not a dataset"),
    ):
        assert_one_sentence(mamba_data(*arguments), said)
        assert not (tmp_path / "out").exists(), arguments
        assert not (tmp_path / "out.partial").exists(), arguments
