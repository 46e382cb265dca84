"""``evaluate`` on a trained run: losses, by context, probes, tasks of the harness, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from data_tools.errors import UserError
from mamba_pretrain.cli import app


@pytest.fixture(scope="module")
def run(workspace) -> Path:
    """A run of five steps."""
    result = workspace.train("measured", "train.steps=5", "evaluation.at_end=true")
    assert result.returncode == 0, result.stderr
    return workspace.root / "measured"


def evaluate(run: Path, *options: object) -> str:
    result = CliRunner().invoke(app, ["evaluate", str(run), "--device", "cpu", *map(str, options)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def measured(run: Path, *options: object) -> dict[str, Any]:
    return json.loads(evaluate(run, "--json", *options))


def test_the_loss_is_that_of_training_however_it_is_cut(run, workspace):
    found = measured(run, "--by-position", "--unigram")
    assert found["step"] == 5
    (score,) = found["datasets"]
    (row,) = workspace.rows("measured", "eval")
    assert score["loss"] == pytest.approx(row["loss"], rel=1e-5)
    assert score["bits_per_byte"] == pytest.approx(row["bits_per_byte"], rel=1e-5)
    assert 3 < score["unigram"] < 7
    buckets = found["by_position"]["data"]
    assert sum(bucket["n_tokens"] for bucket in buckets) == score["n_tokens"]
    assert sum(bucket["loss"] * bucket["n_tokens"] for bucket in buckets) == pytest.approx(score["loss"] * score["n_tokens"], rel=1e-5)


def test_longer_sequences_than_in_training(run):
    found = measured(run, "--length", 256, "--max-samples", 4, "--no-datasets", "--by-position")
    assert "datasets" not in found
    assert max(bucket["last"] for bucket in found["by_position"]["data"]) > 64


def test_probes_are_lines_and_numbers(run):
    found = measured(run, "--no-datasets", "--probes")["probes"]
    assert {probe["name"] for probe in found} == {"induction", "associative_recall", "needle"}
    assert all(0 <= probe["accuracy"] < 0.5 and probe["n_answers"] > 0 for probe in found)
    text = evaluate(run, "--no-datasets", "--probes")
    assert len(text.splitlines()) == 2 + len(found)
    assert "depth 0.5" in text


def test_tasks_of_the_harness(run, tmp_path):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (pip install 'mamba-pretrain[eval]')")
    rows = [{"begin": "def main(", "choices": ["self):", " banana"], "gold": 0}, {"begin": "import ", "choices": ["os", "!!"], "gold": 0}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"task": "endings", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}}}
    task |= {"test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{begin}}", "doc_to_choice": "{{choices}}"}
    task |= {"doc_to_target": "gold", "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]}
    (tmp_path / "endings.yaml").write_text(json.dumps(task))  # JSON is YAML
    text = evaluate(run, "--no-datasets", "--task", "endings", "--task-folder", tmp_path)
    assert "endings" in text
    assert "acc" in text
    task["dataset_kwargs"]["data_files"]["test"] = str(tmp_path / "gone.jsonl")
    (tmp_path / "endings.yaml").write_text(json.dumps(task))
    with pytest.raises(UserError, match="the data of endings cannot be read"):
        evaluate(run, "--no-datasets", "--task", "endings", "--task-folder", tmp_path)


@pytest.fixture(scope="module")
def other_tokenizers_data(workspace, cli) -> Path:
    """The same text in the ids of another tokenizer."""
    root = workspace.root / "other-ids"
    text = [Path(__file__).parents[2] / "docs", "--include", "*.md"]
    for arguments in (
        ["train-tokenizer", *text, "--output", root / "tokenizer", "--vocab-size", "400"],
        ["tokenize", *text, "--tokenizer", root / "tokenizer", "--output", root / "data", "--validation-fraction", "0.2"],
    ):
        assert cli(*arguments, module="data_tools").returncode == 0
    return root / "data"


def test_ids_of_another_tokenizer_are_refused(run, other_tokenizers_data):
    with pytest.raises(UserError, match="another tokenizer than the model's"):
        evaluate(run, "--data", other_tokenizers_data)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--no-datasets"], "leaves nothing to measure"),
        (["--no-datasets", "--probes", "--unigram"], "--unigram compares losses per dataset"),
    ],
)
def test_contradicting_options(run, options, words):
    with pytest.raises(UserError, match=words):
        evaluate(run, *options)
