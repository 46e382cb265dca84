"""AutoTokenizer must give the ids that the model was trained on."""

import json
import textwrap
from pathlib import Path

import pytest

from data_tools.errors import UserError
from data_tools.sentencepiece_export import read_proto, to_tokenizers
from data_tools.tokenizer_export import export_tokenizer
from data_tools.tokenizers import load_tokenizer

transformers = pytest.importorskip("transformers")
sentencepiece = pytest.importorskip("sentencepiece")

CODE = Path(json.__file__).with_name("decoder.py").read_text() + Path(textwrap.__file__).read_text()
TEXTS = [
    # No longer than this: SentencePiece adds up scores of a unigram path in fp32, which decides near-ties wrongly after ten thousand pieces.
    CODE[:6000],
    *CODE.splitlines()[:100],
    "",
    "  ",
    " a",
    "a  b ",
    "\n\n\t x\n",
    "日本語 é ﬁ ½ 🎉 \u00a0 x\u200by",
    "a <s> literal </s> and <unk> <0x0A>",
    "\u2581a \u2581",
    "    x",
    "y    x",
    "\nx",
    "a\n\n<fim>b",
    "\t\ty     z",
]
PLAIN = {"byte_fallback": True, "add_dummy_prefix": False, "remove_extra_whitespaces": False, "normalization_rule_name": "identity"}
SETTINGS = {
    "plain": PLAIN,
    "prefixed": PLAIN | {"add_dummy_prefix": True, "split_digits": True},
    "sentencepiece-defaults": {},
    "symbols": PLAIN | {"add_dummy_prefix": True, "user_defined_symbols": ["<fim>", "\n"]},
}


def train(folder, model_type, **settings):
    folder.mkdir(parents=True, exist_ok=True)
    text = folder / "text.txt"
    text.write_text(CODE)
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=600,
        model_type=model_type,
        minloglevel=2,
        required_chars="<s/unk>0xA",
        **settings,
    )
    return folder


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
@pytest.mark.parametrize("name", SETTINGS)
def test_sentencepiece_ids_survive(model_type, name, tmp_path):
    source = train(tmp_path / "source", model_type, allow_whitespace_only_pieces=True, **SETTINGS[name])
    ours = load_tokenizer(source)
    tokens = export_tokenizer(source, tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert len(theirs) == ours.vocab_size
    for text in TEXTS:
        ids = ours.encode(text)
        assert theirs(text)["input_ids"] == ids, text
        if name != "sentencepiece-defaults":  # without byte fallback an unknown letter decodes to each library's own mark
            assert theirs.decode(ids) == ours.decode(ids), text
    assert tokens == {"bos_token_id": ours.bos_id, "eos_token_id": ours.eos_id}
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.unk_token) == (ours.bos_id, ours.eos_id, "<unk>")


def test_runs_of_spaces_as_symbols_need_bpe(tmp_path):
    runs = {"user_defined_symbols": ["\u2581\u2581", "\u2581\u2581\u2581\u2581"]}
    source = train(tmp_path / "bpe", "bpe", **PLAIN, **runs)
    export_tokenizer(source, tmp_path / "out")
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path / "out"), load_tokenizer(source)
    assert all(theirs(text)["input_ids"] == ours.encode(text) for text in TEXTS)
    with pytest.raises(UserError, match="unigram model with user-defined runs of spaces"):
        export_tokenizer(train(tmp_path / "unigram", "unigram", **PLAIN, **runs), tmp_path / "other")


def test_other_sentencepiece_models_are_refused(tmp_path):
    source = train(tmp_path, "bpe", **PLAIN)
    proto = read_proto(source / "tokenizer.model")
    proto.trainer_spec.model_type = 4
    with pytest.raises(UserError, match="word or character model"):
        to_tokenizers(proto, "x")
    proto.trainer_spec.treat_whitespace_as_suffix = True
    with pytest.raises(UserError, match="puts spaces behind words"):
        to_tokenizers(proto, "x")
    (tmp_path / "bad.model").write_bytes(b"\xff\xff")
    with pytest.raises(UserError, match="is not a SentencePiece model"):
        read_proto(tmp_path / "bad.model")


def byte_level(folder):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([CODE], trainers.BpeTrainer(vocab_size=500, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet))
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_a_bare_tokenizer_json_gets_a_configuration(tmp_path):
    source = byte_level(tmp_path / "source")
    assert export_tokenizer(source, tmp_path / "out") == {"bos_token_id": 0, "eos_token_id": 0}
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path / "out"), load_tokenizer(source)
    for text in [*TEXTS, "x <|endoftext|> y"]:
        assert theirs(text)["input_ids"] == ours.encode(text), text
        assert theirs.decode(ours.encode(text)) == text
    assert theirs.eos_token == "<|endoftext|>"


def test_a_configured_tokenizer_is_copied(tmp_path):
    source = byte_level(tmp_path / "source")
    (source / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}')
    (tmp_path / "out").mkdir()
    export_tokenizer(source, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer_config.json").read_text() == (source / "tokenizer_config.json").read_text()


def test_the_command_exports_and_overwrites_only_when_told(tmp_path, tokenizers, mamba_data, texts):
    out = tmp_path / "out"
    assert mamba_data("export-tokenizer", tokenizers["sentencepiece"], "--output", out).code == 0
    theirs, ours = transformers.AutoTokenizer.from_pretrained(out), load_tokenizer(tokenizers["sentencepiece"])
    assert all(theirs(text)["input_ids"] == ours.encode(text) for text in texts[:40])
    again = mamba_data("export-tokenizer", tokenizers["hf"], "--output", out)
    assert again.code == 2
    assert "already holds files" in again.err
    assert mamba_data("export-tokenizer", tokenizers["hf"], "--output", out, "--overwrite").code == 0
