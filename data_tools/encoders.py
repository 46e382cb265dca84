"""Fast encoders, used only where they give the ids of the reference.

gigatoken and fastokens encode many times faster than the reference libraries, and differ from them in rare texts. Known differences are
avoided: a document that contains a control token's literal text, or letters that the tokenizer would normalise, goes to the reference. Unknown
ones are looked for: on the first documents before anything is written, and on one document in ``check_every`` afterwards.
"""

from __future__ import annotations

import importlib.metadata
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from data_tools.errors import UserError
from data_tools.tokenizers import SentencePieceTokenizer, Tokenizer

REFERENCE = "reference"
FAST = {"sentencepiece": ("gigatoken",), "tokenizers": ("gigatoken", "fastokens")}  # by kind of tokenizer, the fastest first


class Encoder(Protocol):
    """Text to ids."""

    name: str
    version: str

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, without BOS or EOS."""


class ReferenceEncoder:
    """The library that defines the tokenizer."""

    name = REFERENCE

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.version = tokenizer.version

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """See ``Encoder``."""
        return self.tokenizer.encode_batch(texts)


class FastEncoder:
    """gigatoken or fastokens, with the reference for the documents that they are known to encode otherwise."""

    def __init__(self, name: str, tokenizer: Tokenizer) -> None:
        """Raises UserError when the library is not installed or cannot serve the tokenizer."""
        self.name = name
        self._tokenizer = tokenizer
        try:
            self._encode = OPENERS[name](tokenizer)
            self.version = f"{name} {importlib.metadata.version(name)}"
        except ImportError as error:
            raise UserError(f"{name} is not installed; pip install 'mamba-pretrain[fast]', or pass --encoder reference") from error
        except Exception as error:  # these libraries raise plain exceptions of many kinds
            raise UserError(f"{name} cannot serve {tokenizer.path} ({str(error).splitlines()[0]}); pass --encoder reference") from error
        self._literals = [literal for literal in tokenizer.literals if literal]
        # Three letters of each literal are looked for first: hundreds of control tokens share a handful of beginnings.
        self._beginnings = sorted({literal[:3] for literal in self._literals})

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """See ``Encoder``."""
        others = [i for i, text in enumerate(texts) if not self._is_plain(text)]
        if not others:
            return self._encode(texts)
        rest = list(texts)
        for i in others:
            rest[i] = ""
        encoded = self._encode(rest)
        for i, ids in zip(others, self._tokenizer.encode_batch([texts[i] for i in others]), strict=True):
            encoded[i] = ids
        return encoded

    def _is_plain(self, text: str) -> bool:
        """Whether nothing in the text is known to be encoded otherwise than by the reference."""
        if any(beginning in text for beginning in self._beginnings) and any(literal in text for literal in self._literals):
            return False
        normalization = self._tokenizer.normalization
        if normalization == "none" or text.isascii():
            return True
        return normalization == "nfc" and unicodedata.is_normalized("NFC", text)


Encode = Callable[[Sequence[str]], list[np.ndarray]]


def _open_gigatoken(tokenizer: Tokenizer) -> Encode:
    import gigatoken

    opened: Any = (
        gigatoken.Tokenizer.from_sentencepiece(tokenizer.path)
        if isinstance(tokenizer, SentencePieceTokenizer)
        else gigatoken.Tokenizer.from_json(tokenizer.path.read_bytes())
    )
    encode = opened.backend.encode  # one call a text: the batch call would import awkward and return its arrays
    return lambda texts: [encode(text) for text in texts]


def _open_fastokens(tokenizer: Tokenizer) -> Encode:
    import fastokens

    opened = fastokens.Tokenizer.from_file(str(tokenizer.path))

    def encode(texts: Sequence[str]) -> list[np.ndarray]:
        data, offsets = opened.encode_batch_flat(list(texts), split_special_tokens=True)
        return np.split(np.frombuffer(data, dtype=np.uint32), np.frombuffer(offsets, dtype=np.uint64)[1:-1].astype(np.int64))

    return encode


OPENERS: dict[str, Callable[[Tokenizer], Encode]] = {"gigatoken": _open_gigatoken, "fastokens": _open_fastokens}


def open_encoder(name: str, tokenizer: Tokenizer) -> Encoder:
    """``reference``, ``gigatoken`` or ``fastokens`` for a tokenizer. Raises UserError when it cannot be had."""
    if name == REFERENCE:
        return ReferenceEncoder(tokenizer)
    if name not in FAST[tokenizer.kind]:
        raise UserError(f"encoder {name} does not know tokenizers of kind {tokenizer.kind}; use auto or reference")
    return FastEncoder(name, tokenizer)


def choose_encoder(wanted: str, tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[Encoder, list[str]]:
    """The encoder to use, and sentences about those passed over. ``auto`` takes the fastest that gives the reference's ids on ``texts``.

    Raises UserError when an encoder asked for by name is not to be had or gives other ids.
    """
    if wanted != "auto":
        encoder = open_encoder(wanted, tokenizer)
        check(encoder, tokenizer, texts)
        return encoder, []
    notes: list[str] = []
    for name in FAST[tokenizer.kind]:
        try:
            encoder = open_encoder(name, tokenizer)
            check(encoder, tokenizer, texts)
            return encoder, notes
        except UserError as error:
            notes.append(str(error).partition("; ")[0])
    return ReferenceEncoder(tokenizer), notes


def check(encoder: Encoder, tokenizer: Tokenizer, texts: Sequence[str]) -> None:
    """Compares an encoder with the reference. Raises UserError with the first text that differs."""
    if encoder.name == REFERENCE:
        return
    for text, ids, expected in zip(texts, encoder.encode_batch(texts), tokenizer.encode_batch(texts), strict=True):
        if not np.array_equal(ids, expected):
            raise UserError(
                f"{encoder.version} gives other ids than {tokenizer.version} for the document that begins {text[:40]!r}; "
                "pass --encoder reference (slower, and right)"
            )
