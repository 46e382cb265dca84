"""Wrong input: one sentence that names the mend, exit code 2, no traceback, nothing overwritten."""

from __future__ import annotations

import shutil
import subprocess

import pytest


def assert_one_sentence(result: subprocess.CompletedProcess[str], *words: str) -> None:
    """Exit code 2 and one line on stderr that starts with ``error:`` and holds the words."""
    errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert result.returncode == 2, (result.returncode, result.stdout, result.stderr)
    assert "Traceback" not in result.stderr
    assert len(errors) == 1, result.stderr
    for word in words:
        assert word in errors[0], errors[0]


CONFIG_MISTAKES = {
    "unknown key": (["optim.learning_rat=1"], ["unknown key optim.learning_rat"]),
    "near miss": (["train.stpes=3"], ["did you mean steps?"]),
    "unknown key in a list": (["data.sources.0.pth=x"], ["data.sources.0.pth", "did you mean path?"]),
    "wrong type": (["train.micro_batch_size=many"], ["train.micro_batch_size", "many"]),
    "not an override": (["train.steps"], ["key.path=value"]),
    "batch not divisible": (["train.micro_batch_size=3"], ["not divisible", "global_batch_size=3"]),
    "sequence longer than the data": (["data.sequence_length=100000000"], ["sequence_length"]),
    "vocabulary smaller than the ids": (["model.vocab_size=200"], ["vocab", "512"]),
    "no checkpoint to resume": (["train.resume=require", "run_dir={root}/none"], ["no complete checkpoint"]),
    "missing dataset": (["data.sources.0.path=/nowhere"], ["/nowhere", "mamba-data tokenize"]),
    "two lengths": (["train.tokens=5"], ["exactly one of steps and tokens"]),
    "unknown strategy": (["parallel.strategy=fsdp3"], ["parallel.strategy"]),
    "more processes asked for than there are": (["parallel.strategy=ddp"], ["ddp"]),
}


@pytest.mark.parametrize("mistake", CONFIG_MISTAKES)
def test_mistakes_in_the_config(workspace, mistake):
    overrides, words = CONFIG_MISTAKES[mistake]
    result = workspace.train("mistaken", *(override.format(root=workspace.root) for override in overrides))
    assert_one_sentence(result, *words)
    assert not (workspace.root / "mistaken" / "metrics.jsonl").exists()


def test_missing_config(cli):
    assert_one_sentence(cli("train", "nowhere.yaml"), "nowhere.yaml", "configs/quickstart.yaml")


def test_broken_yaml(cli, tmp_path):
    path = tmp_path / "broken.yaml"
    path.write_text("model: [1, 2\nname")
    assert_one_sentence(cli("train", path), "broken.yaml")


def test_a_truncated_shard_is_named(workspace, tmp_path):
    damaged = tmp_path / "data"
    shutil.copytree(workspace.data, damaged)
    shard = next((damaged / "train").glob("*.bin"))
    shard.write_bytes(shard.read_bytes()[:-100])
    assert_one_sentence(workspace.train("truncated", f"data.sources.0.path={damaged}"), shard.name)


def test_a_folder_with_strangers_files_is_no_run_folder(workspace, tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    assert_one_sentence(workspace.train("strange", f"run_dir={tmp_path}"), str(tmp_path), "run_dir")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_checkpoint_of_another_architecture(workspace):
    assert workspace.train("architecture", "train.steps=2").returncode == 0
    before = (workspace.root / "architecture" / "metrics.jsonl").read_bytes()
    result = workspace.train("architecture", "train.steps=4", "model.d_model=48")
    assert_one_sentence(result, "embedding.weight")
    assert (workspace.root / "architecture" / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("command", ["sample", "evaluate", "export", "checkpoints"])
def test_commands_on_a_folder_that_is_no_run(cli, tmp_path, command):
    extra = {"sample": ["--prompt", "x"], "export": [tmp_path / "out"]}.get(command, [])
    assert_one_sentence(cli(command, tmp_path, *extra), str(tmp_path))


def test_export_does_not_overwrite(workspace, cli, tmp_path):
    assert workspace.train("to-export", "train.steps=2").returncode == 0
    (tmp_path / "model.safetensors").write_text("precious")
    assert_one_sentence(cli("export", workspace.root / "to-export", tmp_path), "--overwrite")
    assert (tmp_path / "model.safetensors").read_text() == "precious"


def test_tokenizers_of_two_sources_must_agree(workspace, cli):
    (workspace.root / "more.txt").write_text("other text, other tokenizer\n" * 500)
    other = workspace.root / "other"
    for arguments in (
        ["train-tokenizer", workspace.root / "more.txt", "--output", other / "tokenizer", "--vocab-size", "290"],
        ["tokenize", workspace.root / "more.txt", "--tokenizer", other / "tokenizer", "--output", other / "data"],
    ):
        result = cli(*arguments, module="data_tools")
        assert result.returncode == 0, result.stderr
    sources = f"data.sources=[{{path: {workspace.data}}}, {{path: {other / 'data'}}}]"
    assert_one_sentence(workspace.train("two-tokenizers", sources), "tokenizer")


def test_an_empty_corpus(cli, tmp_path):
    (tmp_path / "empty").mkdir()
    result = cli("train-tokenizer", tmp_path / "empty", "--output", tmp_path / "t", "--vocab-size", "300", module="data_tools")
    assert_one_sentence(result, str(tmp_path / "empty"))
    assert not (tmp_path / "t").exists()
