"""Fast encoders, used only where they give the ids of the reference.

gigatoken and fastokens encode many times faster than the reference libraries, and differ from them in rare texts. Known differences are
avoided: control tokens are hidden from them, and so are normalisations. Unknown ones are looked for: on the first
documents before anything is written, and on one document in ``check_every`` afterwards.
"""

from __future__ import annotations

import importlib.metadata
import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import orjson

from data_tools.errors import UserError
from data_tools.tokenizers import SentencePieceTokenizer, Tokenizer

REFERENCE = "reference"
CHECKED_CHARACTERS = 64 << 10  # of a document: the reference needs some hundred bytes of memory a character
NORMALIZED_AT_ONCE = 4096  # characters
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
    """gigatoken or fastokens, with the reference for the texts that they are known to encode otherwise."""

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

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """See ``Encoder``."""
        normalization = self._tokenizer.normalization
        data = [text.encode() for text in texts]
        if normalization == "none":
            return self._encode(data)
        others = [i for i, text in enumerate(texts) if not text.isascii() and not (normalization == "nfc" and _is_nfc(text, data[i]))]
        if normalization == "nfc":
            for i in others:
                data[i] = self._nfc(texts[i])
            return self._encode(data)
        for i in others:
            data[i] = b""
        encoded = self._encode(data)
        for i, ids in zip(others, self._tokenizer.encode_batch([texts[i] for i in others]), strict=True):
            encoded[i] = ids
        return encoded

    def _nfc(self, text: str) -> bytes:
        """UTF-8 of the text as the reference normalises it, in pieces of whole lines as few of them need it: nothing combines with a line's end."""
        pieces: list[bytes] = []
        begin = 0
        while begin < len(text):
            end = text.find("\n", begin + NORMALIZED_AT_ONCE) + 1 or len(text)
            piece = text[begin:end]
            data = piece.encode()
            pieces.append(data if _is_nfc(piece, data) else self._tokenizer.normalize(piece).encode())
            begin = end
        return b"".join(pieces)


# Bytes of UTF-8 in which no letter stands that NFC may change: ASCII, U+0080 ... U+02FF, and, but for what follows, U+2000 ... U+2FFF.
_SAFE = bytes([*range(0xCC), 0xE2])
_UNSAFE = re.compile(rb"\xe2(?:[\x83\x84\x8c\xab\xb3\xb5\xb7]|\x80[\x80\x81])")


def _is_nfc(text: str, data: bytes) -> bool:
    """Whether a text (``data`` is its UTF-8) is in NFC. Most is seen by its bytes, much faster than looking each letter up."""
    if not data.translate(None, _SAFE) and not _UNSAFE.search(data):
        return True
    return unicodedata.is_normalized("NFC", text)


Encode = Callable[[Sequence[bytes]], list[np.ndarray]]


def _open_gigatoken(tokenizer: Tokenizer) -> Encode:
    import gigatoken

    description: str | bytes | None = tokenizer.path.read_bytes()
    if isinstance(tokenizer, SentencePieceTokenizer):
        description = gigatoken.Tokenizer.from_sentencepiece(tokenizer.path)._hf_json
    encode = gigatoken.Tokenizer.from_json(_bare(description or b"", tokenizer)).backend.encode
    return lambda data: [encode(text) for text in data]  # the batch call would import awkward and return its arrays


def _bare(description: str | bytes, tokenizer: Tokenizer) -> bytes:
    """A ``tokenizer.json`` that knows no control tokens, so that their text in a document stays text, and does not normalise to NFC: the
    libraries' Unicode tables are of different years, so that is left to the reference.
    """
    described = orjson.loads(description)
    described["added_tokens"] = [token for token in described.get("added_tokens") or [] if not token.get("special")]
    if tokenizer.normalization == "nfc":
        described["normalizer"] = None
    return orjson.dumps(described)


def _open_fastokens(tokenizer: Tokenizer) -> Encode:
    import fastokens

    opened = fastokens.Tokenizer.from_json_str(_bare(tokenizer.path.read_bytes(), tokenizer).decode())

    def encode(data: Sequence[bytes]) -> list[np.ndarray]:
        ids, offsets = opened.encode_batch_flat([text.decode() for text in data])
        return np.split(np.frombuffer(ids, dtype=np.uint32), np.frombuffer(offsets, dtype=np.uint64)[1:-1].astype(np.int64))

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
    texts = [text[:CHECKED_CHARACTERS] for text in texts]
    for text, ids, expected in zip(texts, encoder.encode_batch(texts), tokenizer.encode_batch(texts), strict=True):
        if not np.array_equal(ids, expected):
            raise UserError(
                f"{encoder.version} gives other ids than {tokenizer.version} for the document that begins {text[:40]!r}; "
                "pass --encoder reference (slower, and right)"
            )
