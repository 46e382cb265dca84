"""The command line: quick help, stdin, arrays, and tokenizer training end to end."""

from __future__ import annotations

import importlib.metadata
import io
import subprocess
import sys

import orjson
import pytest

from data_tools.cli.app import app
from data_tools.manifest import Manifest
from data_tools.tokenizers import load_tokenizer

COMMANDS = ["train-tokenizer", "export-tokenizer", "tokenize", "import", "inspect", "stats", "verify", "merge", "split"]


def test_help_imports_nothing_heavy():
    code = "import sys; from data_tools.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "print([name for name in ('torch', 'numpy', 'pyarrow', 'datasets', 'tokenizers', 'matplotlib') if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"


def test_version_is_printed(mamba_data):
    result = mamba_data("--version")
    assert (result.code, result.out.strip()) == (0, f"mamba-data {importlib.metadata.version('mamba-pretrain')}")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_an_example_that_it_accepts(command, mamba_data):
    """The example of a command's help names only options that it has."""
    result = mamba_data(command, "--help")
    assert result.code == 0
    (function,) = [info.callback for info in app.registered_commands if info.name == command]
    example = function.__doc__.partition("Example: `")[2].partition("`")[0]
    assert example.startswith(f"mamba-data {command} ")
    for option in (word for word in example.split() if word.startswith("--")):
        assert option in result.out


def test_stdin(tmp_path, tokenizers, mamba_data, monkeypatch, texts):
    lines = b"".join(orjson.dumps({"text": text}) + b"\n" for text in texts[:30])
    for _ in range(2):  # the second time there is nothing left to do
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines)))
        assert mamba_data("tokenize", "-", "--tokenizer", tokenizers["sentencepiece"], "--output", tmp_path / "out").code == 0
    assert Manifest.load(tmp_path / "out").counts["documents"] == 30
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO()))
    result = mamba_data("tokenize", "-", "--tokenizer", tokenizers["sentencepiece"], "--output", tmp_path / "b")
    assert "stdin is empty" in result.err


@pytest.mark.usefixtures("small_tasks")
def test_an_array_completed_by_merge(tmp_path, tokenizers, mamba_data, texts, write_jsonl):
    for number in range(3):
        write_jsonl(tmp_path / "raw" / f"{number}.jsonl", texts[number * 20 : number * 20 + 20] * 9)
    command = [
        "tokenize",
        tmp_path / "raw",
        "--tokenizer",
        tokenizers["hf"],
        "--output",
        tmp_path / "out",
        "--workers",
        "1",  # spawned processes would not know of small blocks
        "--task-count",
        "2",
        "--task-index",
    ]
    assert "is done" in mamba_data(*command, "1").out
    unfinished = mamba_data("merge", tmp_path / "out")
    assert unfinished.code == 2
    assert "run the array's failed tasks again" in unfinished.err
    assert mamba_data(*command, "0").code == 0
    assert "540 documents" in mamba_data("merge", tmp_path / "out").out
    assert mamba_data("verify", tmp_path / "out", "--inputs").code == 0


@pytest.mark.parametrize("model", ["bpe", "unigram"])
def test_a_trained_tokenizer_knows_every_text(tmp_path, mamba_data, texts, write_jsonl, model):
    source = write_jsonl(tmp_path / "a.jsonl", texts[:300])
    arguments = ["train-tokenizer", source, "--output", tmp_path / "t", "--vocab-size", "500", "--model", model]
    result = mamba_data(*arguments)
    assert result.code == 0, result.err
    assert float(result.out.partition(" bytes per token")[0].rpartition(" ")[2]) > 1.5
    tokenizer = load_tokenizer(tmp_path / "t")
    for text in ("  def f(x):\n\treturn 'naïve' \n\n", "日本語 🤖\u200d", "\x00\x7f", "<s></s>"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert "--overwrite" in mamba_data(*arguments).err
    before = (tmp_path / "t" / "tokenizer.model").read_bytes()
    assert mamba_data(*arguments, "--overwrite").code == 0
    assert (tmp_path / "t" / "tokenizer.model").read_bytes() == before  # the same seed, the same tokenizer


def test_a_sample_is_drawn_from_all_over_the_corpus(tmp_path, texts, write_jsonl):
    from data_tools.sources import plan_tasks
    from data_tools.tokenizer_training import _sample

    files = [str(write_jsonl(tmp_path / f"{i}.jsonl", [f"{i} " * 50] * 40)) for i in range(6)]
    tasks = [task for file in files for task in plan_tasks([file])]
    drawn, held_out = _sample(tasks, "text", 6000, seed=3)
    assert {text.split()[0] for text in drawn + held_out} == {str(i) for i in range(6)}
    assert 5000 < sum(map(len, drawn + held_out)) < 7500
    everything, rest = _sample(tasks, "text", 1 << 20, seed=3)
    assert len(everything) + len(rest) == 240
