"""Fast encoders give the reference's ids: on random Unicode, on control tokens' text, under normalisation."""

from __future__ import annotations

import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools import encoders
from data_tools.encoders import FAST, FastEncoder, ReferenceEncoder, check, choose_encoder, open_encoder, surely_nfc
from data_tools.errors import UserError
from data_tools.tokenizers import load_tokenizer

CASES = [(kind, name) for kind, names in (("sentencepiece", FAST["sentencepiece"]), ("hf", FAST["tokenizers"])) for name in names]
PIECES = [
    "<s>",
    "</s>",
    "<unk>",
    "<|endoftext|>",
    "<|padding|>",
    "<0x41>",
    " ",
    "  \n",
    "a",
    "é",
    "e\u0301",
    "\u0c3c\u05bc",
    "\u1100\u1161",
    "def f(x):",
    "\x00",
    "🤖\u200d",
]
TEXT = st.one_of(st.text(max_size=60), st.lists(st.sampled_from(PIECES), max_size=10).map("".join))


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_ids_equal_the_references(tokenizers, kind, name):
    tokenizer = load_tokenizer(tokenizers[kind])
    encoder = FastEncoder(name, tokenizer)

    @settings(max_examples=150, deadline=None)
    @given(st.lists(TEXT, min_size=1, max_size=20))
    def equal(texts):
        found = encoder.encode_batch([text.encode() for text in texts])
        for text, ids, expected in zip(texts, found, tokenizer.encode_batch(texts), strict=True):
            assert ids.tolist() == expected.tolist(), text

    equal()


@pytest.mark.parametrize(("kind", "name"), [*CASES, ("sentencepiece", "reference"), ("hf", "reference")])
def test_the_text_of_a_control_token_stays_text(tokenizers, texts, kind, name):
    tokenizer = load_tokenizer(tokenizers[kind])
    literal = {"sentencepiece": "</s>", "hf": "<|endoftext|>"}[kind]
    (ids,) = open_encoder(name, tokenizer).encode_batch([f"before {literal} after".encode()])
    assert tokenizer.eos_id is not None
    assert tokenizer.eos_id not in ids.tolist()
    assert tokenizer.decode(ids.tolist()) == f"before {literal} after"


def test_other_normalisations_leave_odd_letters_to_the_reference(texts, tmp_path):
    import sentencepiece

    lines = [line for text in texts[:200] for line in text.splitlines()]
    with (tmp_path / "tokenizer.model").open("wb") as file:  # the library's default: NFKC and more
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=file, vocab_size=600, model_type="bpe", byte_fallback=True, minloglevel=2
        )
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.normalization == "other"
    asked = []
    encode = tokenizer.encode_batch
    tokenizer.encode_batch = lambda batch: asked.extend(batch) or encode(batch)
    found = FastEncoder("gigatoken", tokenizer).encode_batch([text.encode() for text in ("plain", "\ufb01ne", "x")])
    assert asked == ["\ufb01ne"]
    assert [tokenizer.decode(ids.tolist()) for ids in found] == ["plain", "fine", "x"]


def test_auto_takes_the_first_that_agrees_and_says_what_it_passed_over(tokenizers, texts, monkeypatch):
    tokenizer = load_tokenizer(tokenizers["hf"])
    documents = [text.encode() for text in texts[:50]]
    encoder, notes = choose_encoder("auto", tokenizer, documents)
    assert (encoder.name, notes) == ("gigatoken", [])
    encode = FastEncoder.encode_batch

    def wrong(self, batch):
        return [ids[:-1] for ids in encode(self, batch)] if self.name == "gigatoken" else encode(self, batch)

    monkeypatch.setattr(FastEncoder, "encode_batch", wrong)
    encoder, notes = choose_encoder("auto", tokenizer, documents)
    assert encoder.name == "fastokens"
    assert len(notes) == 1
    assert "gigatoken" in notes[0]
    with pytest.raises(UserError, match="gives other ids than tokenizers"):
        choose_encoder("gigatoken", tokenizer, documents)


def test_a_tokenizer_that_the_fast_library_does_not_know(tokenizers, tmp_path):
    """SentencePiece unigram models: gigatoken refuses them, auto falls back."""
    from data_tools.sources import find_files, plan_tasks
    from data_tools.tokenizer_training import train_tokenizer

    source = tokenizers["sentencepiece"].parent / "text.jsonl"
    train_tokenizer(plan_tasks(find_files([str(source)], [], [])), tmp_path / "t", 500, "unigram", "text", 1 << 18, 0, False)
    tokenizer = load_tokenizer(tmp_path / "t")
    encoder, notes = choose_encoder("auto", tokenizer, [b"some text"])
    assert encoder.name == "reference"
    assert "gigatoken cannot serve" in notes[0]
    with pytest.raises(UserError, match="does not know tokenizers of kind sentencepiece"):
        open_encoder("fastokens", tokenizer)


def test_the_reference_needs_no_check(tokenizers):
    tokenizer = load_tokenizer(tokenizers["hf"])
    encoder = ReferenceEncoder(tokenizer)
    tokenizer.encode_batch = lambda texts: pytest.fail("the reference was compared with itself")
    check(encoder, tokenizer, [b"x"])


def test_only_the_beginning_of_a_huge_document_is_compared(tokenizers):
    tokenizer = load_tokenizer(tokenizers["hf"])
    encoder = FastEncoder("gigatoken", tokenizer)
    sizes = []
    encode = tokenizer.encode_batch
    tokenizer.encode_batch = lambda texts: sizes.extend(map(len, texts)) or encode(texts)
    check(encoder, tokenizer, [b"long " * 100_000])
    assert sizes == [64 << 10]
    assert np.array_equal(encoder.encode_batch([b"a b"])[0], encode(["a b"])[0])


def test_the_quick_look_for_nfc_takes_no_letter_for_safe_that_is_not():
    """Alone and behind letters that combine with marks."""
    safe = [chr(code) for code in range(0x3000) if surely_nfc(chr(code).encode())]
    assert len(safe) > 4000
    for letter in safe:
        assert all(unicodedata.is_normalized("NFC", before + letter) for before in ("", "a", "\u0308", "\u1100")), hex(ord(letter))
    assert not any(surely_nfc(chr(code).encode()) for code in range(0x3000, 0x110000, 97) if not 0xD800 <= code < 0xE000)


LINES = st.lists(
    st.sampled_from(["plain text\n", "caf\u00e9 \u2014 \u2500\n", "e\u0301", "\u212b\n", "\u1100\u1161", "\n", " "]), max_size=40
)


def test_normalising_by_lines_is_normalising_the_whole(tokenizers, monkeypatch):
    encoder = FastEncoder("gigatoken", load_tokenizer(tokenizers["hf"]))

    @settings(max_examples=60, deadline=None)
    @given(LINES.map("".join), st.integers(1, 50))
    def equal(text, size):
        monkeypatch.setattr(encoders, "SEARCHED_AT_ONCE", 3 * size)
        monkeypatch.setattr(encoders, "NORMALIZED_AT_ONCE", size)
        assert encoder._nfc(text.encode()).decode() == unicodedata.normalize("NFC", text)

    equal()
