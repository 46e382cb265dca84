"""Fast encoders, used only where they give the ids of the reference.

gigatoken and fastokens encode many times faster than the reference libraries, and differ from them in rare texts. Known differences are
avoided: control tokens are hidden from them, and so are normalisations. Unknown ones are looked for: on the first
documents before anything is written, and on one document in ``check_every`` afterwards.
"""

from __future__ import annotations

import importlib.metadata
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Protocol

import numpy as np
import orjson

from data_tools.errors import UserError
from data_tools.tokenizers import SentencePieceTokenizer, Tokenizer

REFERENCE = "reference"
CHECKED_BYTES = 64 << 10  # of a document: the reference needs some hundred bytes of memory for each
SEARCHED_AT_ONCE, NORMALIZED_AT_ONCE = 64 << 10, 4 << 10  # bytes
FAST = {"sentencepiece": ("gigatoken",), "tokenizers": ("gigatoken", "fastokens")}  # by kind of tokenizer, the fastest first


class Encoder(Protocol):
    """Text to ids. Texts are UTF-8: documents are large, and holding each as letters too would double the memory and the copying."""

    name: str
    version: str

    def encode_batch(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """Ids of each text, without BOS or EOS."""


class ReferenceEncoder:
    """The library that defines the tokenizer."""

    name = REFERENCE

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.version = tokenizer.version

    def encode_batch(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """See ``Encoder``."""
        return self.tokenizer.encode_batch([text.decode() for text in texts])


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

    def encode_batch(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """See ``Encoder``."""
        normalization = self._tokenizer.normalization
        if normalization == "none":
            return self._encode(texts)
        texts = list(texts)
        others = [i for i, text in enumerate(texts) if not text.isascii()]
        if normalization == "nfc":
            for i in others:
                texts[i] = self._nfc(texts[i])
            return self._encode(texts)
        by_reference = self._tokenizer.encode_batch([texts[i].decode() for i in others])
        for i in others:
            texts[i] = b""
        encoded = self._encode(texts)
        for i, ids in zip(others, by_reference, strict=True):
            encoded[i] = ids
        return encoded

    def _nfc(self, text: bytes) -> bytes:
        """The text as the reference normalises it, which is slow: so only the lines that need it. Nothing combines with a line's end."""
        parts: list[bytes] = []
        done = position = 0
        for block in whole_lines(text, SEARCHED_AT_ONCE):
            if surely_nfc(block):
                position += len(block)
                continue
            for lines in whole_lines(block, NORMALIZED_AT_ONCE):
                letters = lines.decode()
                if not unicodedata.is_normalized("NFC", letters):
                    parts += [text[done:position], self._tokenizer.normalize(letters).encode()]
                    done = position + len(lines)
                position += len(lines)
        return b"".join([*parts, text[done:]]) if parts else text


def whole_lines(text: bytes, size: int) -> Iterator[bytes]:
    """The text in pieces of about ``size`` bytes that end where lines do."""
    begin = 0
    while begin < len(text):
        end = text.find(b"\n", begin + size) + 1 or len(text)
        yield text[begin:end]
        begin = end


# Second bytes, behind 0xE2, of those letters U+2000 ... U+2FFF that NFC may change; with 0x80 only U+2000 and U+2001.
_CHANGED_SECONDS = np.isin(np.arange(256), [0x80, 0x83, 0x84, 0x8C, 0xAB, 0xB3, 0xB5, 0xB7])


def surely_nfc(text: bytes) -> bool:
    """Whether UTF-8 is seen by its bytes to be in NFC, much faster than by looking each letter up. Most is: it holds ASCII, U+0080 ... U+02FF and,
    but for some, U+2000 ... U+2FFF.
    """
    data = np.frombuffer(text, dtype=np.uint8)
    lead = np.flatnonzero(data >= 0xCC)
    if np.any(data[lead] != 0xE2):
        return False
    second = data[lead + 1]
    return not np.any(_CHANGED_SECONDS[second] & ((second != 0x80) | (data[lead + 2] <= 0x81)))


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


def choose_encoder(
    wanted: str, tokenizer: Tokenizer, texts: Sequence[bytes], opened: Callable[[str], Encoder] | None = None
) -> tuple[Encoder, list[str]]:
    """The encoder to use, and sentences about those passed over. ``auto`` takes the fastest that gives the reference's ids on ``texts``.

    ``opened(name)`` may give encoders that are open already. Raises UserError when an encoder asked for by name is not to be had or gives other ids.
    """
    opened = opened or partial(open_encoder, tokenizer=tokenizer)
    if wanted != "auto":
        encoder = opened(wanted)
        check(encoder, tokenizer, texts)
        return encoder, []
    notes: list[str] = []
    for name in FAST[tokenizer.kind]:
        try:
            encoder = opened(name)
            check(encoder, tokenizer, texts)
            return encoder, notes
        except UserError as error:
            notes.append(str(error).partition("; ")[0])
    return ReferenceEncoder(tokenizer), notes


def check(encoder: Encoder, tokenizer: Tokenizer, texts: Sequence[bytes]) -> None:
    """Compares an encoder with the reference. Raises UserError with the first text that differs."""
    if encoder.name == REFERENCE:
        return
    letters = [text[:CHECKED_BYTES].decode(errors="ignore") for text in texts]  # what is cut may end within a letter
    encoded = encoder.encode_batch([text.encode() for text in letters])
    for text, ids, expected in zip(letters, encoded, tokenizer.encode_batch(letters), strict=True):
        if not np.array_equal(ids, expected):
            raise UserError(
                f"{encoder.version} gives other ids than {tokenizer.version} for the document that begins {text[:40]!r}; "
                "pass --encoder reference (slower, and right)"
            )
