"""A whole exported folder, model and tokenizer, generates in transformers what it generates here."""

import json
from pathlib import Path

import pytest
import torch

from data_tools.tokenizers import load_tokenizer
from mamba_pretrain.models.generation import continue_texts, generate
from mamba_pretrain.models.pretrained import export_pretrained

transformers = pytest.importorskip("transformers")
sentencepiece = pytest.importorskip("sentencepiece")


@pytest.fixture
def tokenizer_folder(tmp_path) -> Path:
    (tmp_path / "source").mkdir()
    text = Path(json.__file__).with_name("decoder.py")
    with (tmp_path / "source" / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(text.read_text().splitlines()),
            model_writer=file,
            vocab_size=600,
            model_type="bpe",
            byte_fallback=True,
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            normalization_rule_name="identity",
            minloglevel=2,
        )
    return tmp_path / "source"


@pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
def test_the_whole_folder_generates_the_same_text_in_transformers(kind, small_config, randomized, tokenizer_folder, tmp_path):
    model = randomized(small_config(kind, vocab_size=600))
    export_pretrained(model.state_dict(), model.config, tokenizer_folder, tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs.config.eos_token_id == theirs.generation_config.eos_token_id == tokenizer.eos_token_id == 2
    prompt = tokenizer("def main(", return_tensors="pt")
    output = theirs.generate(**prompt, max_new_tokens=24, do_sample=False)[0]
    ids = prompt["input_ids"][0].tolist()
    assert generate(model, [ids], 24, eos_id=2)[0] == output[len(ids) :].tolist()
    text = continue_texts(model.config, model.state_dict(), tokenizer_folder, ["def main("], 24)[0]
    assert "def main(" + text == load_tokenizer(tokenizer_folder).decode(output.tolist())
