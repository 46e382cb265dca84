"""The harness gives the same results for our model as for the same weights in transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (pip install 'mamba-pretrain[eval]')")
pytest.importorskip("accelerate", reason="the harness's adapter for transformers needs accelerate (pip install 'mamba-pretrain[eval]')")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from data_tools.errors import UserError
from data_tools.tokenizers import load_tokenizer
from mamba_pretrain.models import init
from mamba_pretrain.models.config import ModelConfig
from mamba_pretrain.models.generation import load_model
from mamba_pretrain.models.language_model import LanguageModel
from mamba_pretrain.models.pretrained import export_pretrained, import_pretrained
from mamba_pretrain.training.harness import HarnessModel, evaluate_tasks

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def lines() -> list[str]:
    """Real sentences: this project's own documentation."""
    text = " ".join((REPOSITORY / "docs" / "architecture.md").read_text().split())
    return [part.strip() for part in text.split(". ") if len(part) > 80]


@pytest.fixture(scope="module")
def exported(tmp_path_factory, lines) -> Path:
    """A folder of transformers' format: a SentencePiece tokenizer and random weights, large enough that predictions differ."""
    import sentencepiece

    root = tmp_path_factory.mktemp("harness")
    (root / "tokenizer").mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(root / "tokenizer" / "tokenizer"),
        vocab_size=400,
        byte_fallback=False,  # random weights would write invalid bytes, which libraries show differently
        model_type="bpe",
        minloglevel=2,
    )
    shape = {"vocab_size": 400, "d_model": 64, "n_layer": 2, "d_state": 16, "headdim": 16, "chunk_size": 16}
    config = ModelConfig(mixer="mamba2", tie_word_embeddings=False, initializer_range=0.3, **shape)
    model = LanguageModel(config)
    init.initialize(model, 0)
    export_pretrained(model.state_dict(), config, root / "tokenizer", root / "model")
    return root / "model"


@pytest.fixture(scope="module")
def ours(exported) -> tuple[LanguageModel, object]:
    return load_model(*import_pretrained(exported)), load_tokenizer(exported / "tokenizer.model")


@pytest.fixture(scope="module")
def theirs(exported):
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(exported), device="cpu", dtype="float32", batch_size=4, max_length=256)


def task(folder: Path, name: str, rows: list[dict], **settings) -> dict:
    """A task's description, its rows in a local file."""
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(path)}}, "test_split": "test", "num_fewshot": 0}
    return {"task": name, **data, **settings}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory, lines) -> list[dict]:
    """Which of four endings belongs to a sentence, the perplexity of passages, and a completion."""
    folder = tmp_path_factory.mktemp("tasks")
    halves = [(line[: len(line) // 2], line[len(line) // 2 :]) for line in lines[:24]]
    endings = [
        {"begin": begin, "choices": [halves[(i + k) % len(halves)][1][:40] for k in range(4)], "gold": 0}
        for i, (begin, _) in enumerate(halves)
    ]
    passages = [{"text": " ".join(lines[i : i + 4])} for i in range(0, 16, 4)]
    completions = [{"begin": begin[:60], "end": end[:10]} for begin, end in halves[:6]]
    mean = {"aggregation": "mean", "higher_is_better": True}
    return [
        task(
            folder,
            "endings",
            endings,
            output_type="multiple_choice",
            doc_to_text="{{begin}}",
            doc_to_choice="{{choices}}",
            doc_to_target="gold",
            metric_list=[{"metric": "acc", **mean}, {"metric": "acc_norm", **mean}],
        ),
        task(
            folder,
            "passages",
            passages,
            output_type="loglikelihood_rolling",
            doc_to_text="",
            doc_to_target="{{text}}",
            metric_list=[{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}, {"metric": "bits_per_byte"}],
        ),
        task(
            folder,
            "completions",
            completions,
            output_type="generate_until",
            doc_to_text="{{begin}}",
            doc_to_target="{{end}}",
            generation_kwargs={"until": [" t", "\n"], "max_gen_toks": 12, "do_sample": False},
            metric_list=[{"metric": "exact_match", **mean}],
        ),
    ]


def metrics(results: dict) -> dict[tuple[str, str], float]:
    return {
        (name, metric): value
        for name, found in results.items()
        for metric, value in found.items()
        if isinstance(value, float) and "stderr" not in metric
    }


def test_results_equal_those_through_transformers(ours, theirs, tasks):
    model, tokenizer = ours
    mine = metrics(evaluate_tasks(model, tokenizer, tasks, batch_size=3, max_length=256))
    expected = metrics(simple_evaluate(theirs, tasks=tasks, bootstrap_iters=0, task_manager=TaskManager(include_defaults=False))["results"])
    assert mine.keys() == expected.keys()
    assert {name for name, _ in mine} == {"endings", "passages", "completions"}
    for key, value in expected.items():
        assert mine[key] == pytest.approx(value, rel=1e-4), key


def requests(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, argument, number) for number, argument in enumerate(arguments)]


def test_single_scores_equal_those_of_transformers(ours, theirs, lines):
    """Empty contexts, trailing spaces, contexts longer than the window, letters outside the vocabulary."""
    long = " ".join(lines)
    asked = requests(
        "loglikelihood",
        ("", "Raw text"),
        ("Raw ", "text"),
        (long, " ends here"),
        ("ünï", "cödé"),
        ("a", " b"),
        ("The model", " on the meta device"),
    )
    mine = HarnessModel(*ours, batch_size=4, max_length=64)
    theirs_short = type(theirs)(pretrained=theirs.model, tokenizer=theirs.tokenizer, device="cpu", batch_size=4, max_length=64)
    for (score, greedy), (their_score, their_greedy) in zip(mine.loglikelihood(asked), theirs_short.loglikelihood(asked), strict=True):
        assert score == pytest.approx(their_score, rel=1e-4, abs=1e-4)
        assert greedy == their_greedy
    rolling = requests("loglikelihood_rolling", (long,), ("short",))
    assert mine.loglikelihood_rolling(rolling) == pytest.approx(theirs_short.loglikelihood_rolling(rolling), rel=1e-4)


def test_generated_texts_equal_those_of_transformers(ours, theirs, lines):
    """One by one, as transformers' Mamba reads the padding of a batch of unequal prompts."""
    mine = HarnessModel(*ours, batch_size=4, max_length=256)
    settings = {"until": ["\n", " the"], "max_gen_toks": 16, "do_sample": False}
    prompts = [line[:50] for line in lines[:5]]
    assert len(set(mine.generate_until(requests("generate_until", *((prompt, {"max_gen_toks": 16}) for prompt in prompts))))) > 2
    alone = [theirs.generate_until(requests("generate_until", (prompt, settings)))[0] for prompt in prompts]
    assert mine.generate_until(requests("generate_until", *((prompt, settings) for prompt in prompts))) == alone


def test_settings_are_grouped_and_answers_come_back_in_order(ours):
    mine = HarnessModel(*ours, batch_size=2)
    short, long = {"max_gen_toks": 2}, {"max_gen_toks": 9}
    mixed = mine.generate_until(requests("generate_until", ("one", long), ("two words", short), ("three", long), ("", short)))
    alone = [
        mine.generate_until(requests("generate_until", pair))[0]
        for pair in [("one", long), ("two words", short), ("three", long), ("", short)]
    ]
    assert mixed == alone


def test_scores_do_not_depend_on_the_batch(ours, lines):
    asked = requests("loglikelihood", *((line[:40], line[40:80]) for line in lines[:7]))
    one, many = (HarnessModel(*ours, batch_size=size).loglikelihood(asked) for size in (1, 7))
    assert torch.tensor([score for score, _ in one]) == pytest.approx(torch.tensor([score for score, _ in many]), rel=1e-5)


@pytest.mark.slow
def test_an_unknown_task(ours):
    with pytest.raises(UserError, match="no task 'nonsense-task'"):
        evaluate_tasks(*ours, ["nonsense-task"])


def test_tasks_of_a_folder(ours, tasks, tmp_path):
    (tmp_path / "endings.yaml").write_text(json.dumps(tasks[0]))  # JSON is YAML
    assert metrics(evaluate_tasks(*ours, ["endings"], limit=5, task_folder=tmp_path)).keys() == {
        ("endings", "acc,none"),
        ("endings", "acc_norm,none"),
    }


def test_more_new_tokens_than_fit(ours):
    with pytest.raises(UserError, match="generates 50 tokens, and max_length is 50"):
        HarnessModel(*ours, max_length=50).generate_until(requests("generate_until", ("a", {"max_gen_toks": 50})))
