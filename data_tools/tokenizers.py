"""One interface for tokenizers: SentencePiece models and Hugging Face ``tokenizer.json`` files.

Policy for special tokens that appear literally in a text (``<|endoftext|>``, ``</s>``): they are text. No encoder here ever turns them into control
ids, which would let a document forge its own end.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from data_tools.errors import UserError
from data_tools.memory import give_back_memory

SENTENCEPIECE_FILE = "tokenizer.model"
HF_FILE = "tokenizer.json"
END_TOKENS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "<|im_end|>")
PROBE = "\ufb01 \u2460 e\u0301 \u212b"  # changes under every Unicode normalisation
BEGIN_TOKENS = ("<s>", "<|begin_of_text|>", "<bos>", "<|endoftext|>")


class Tokenizer(ABC):
    """Text to token ids and back. ``eos_id`` ends a document; ``bos_id`` may begin one; both None if the tokenizer has none.

    ``normalization`` says what is done to letters before text is cut: nothing, Unicode's NFC, or something else.
    """

    kind: str
    file_name: str
    vocab_size: int
    eos_id: int | None
    bos_id: int | None
    path: Path
    normalization: Literal["none", "nfc", "other"]

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids (int32) of each text, without BOS or EOS."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; control tokens are left out."""

    def normalize(self, text: str) -> str:
        """The text as it is before it is cut into tokens."""
        return text

    def rest(self) -> None:  # noqa: B027  # most have nothing to free
        """Frees what encoding took; the next encoding opens it again."""

    @property
    @abstractmethod
    def version(self) -> str:
        """Name and version of the library that encodes."""

    def encode(self, text: str) -> list[int]:
        """Ids of one text."""
        return self.encode_batch([text])[0].tolist()

    @property
    def files(self) -> list[Path]:
        """The files that define the tokenizer."""
        beside = [self.path.with_name(name) for name in ("tokenizer_config.json", "special_tokens_map.json")]
        return [self.path, *(path for path in beside if path.is_file())]

    @property
    def hash(self) -> str:
        """sha256 of the file that decides the ids."""
        return hashlib.sha256(self.path.read_bytes()).hexdigest()

    def save(self, folder: Path) -> list[str]:
        """Copies the files into ``folder`` under the names that ``load_tokenizer`` looks for; returns the names."""
        folder.mkdir(parents=True, exist_ok=True)
        names = [self.file_name if path == self.path else path.name for path in self.files]
        for path, name in zip(self.files, names, strict=True):
            (folder / name).write_bytes(path.read_bytes())
        return names


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece ``.model``."""

    kind = "sentencepiece"
    file_name = SENTENCEPIECE_FILE

    def __init__(self, path: Path) -> None:
        import sentencepiece

        self.path = path
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise UserError(f"{path} is not a SentencePiece model ({error}); train one with `mamba-data train-tokenizer`") from error
        self._version = f"sentencepiece {sentencepiece.__version__}"
        self.vocab_size = self._model.vocab_size()
        self.eos_id = self._model.eos_id() if self._model.eos_id() >= 0 else None
        self.bos_id = self._model.bos_id() if self._model.bos_id() >= 0 else None
        self.normalization = "none" if self._model.normalize(PROBE).replace("\u2581", " ").strip() == PROBE else "other"

    @property
    def version(self) -> str:
        """See ``Tokenizer.version``."""
        return self._version

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """See ``Tokenizer.encode_batch``. SentencePiece never maps text to control symbols by itself."""
        return [np.asarray(ids, dtype=np.int32) for ids in self._model.encode(list(texts), num_threads=1)]

    def decode(self, ids: Sequence[int]) -> str:
        """See ``Tokenizer.decode``."""
        return self._model.decode([int(i) for i in ids])


class HFTokenizer(Tokenizer):
    """A Hugging Face ``tokenizer.json``. The library reads it when something is first encoded: workers with a fast encoder never need it."""

    kind = "tokenizers"
    file_name = HF_FILE

    def __init__(self, path: Path) -> None:
        import orjson

        self.path = path
        try:
            description = orjson.loads(path.read_bytes())
            self._ids = _all_ids(description)
            self.normalization = _normalization(description.get("normalizer"))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is not a tokenizer.json ({error}); save the tokenizer again with save_pretrained") from error
        self.vocab_size = max(self._ids.values()) + 1
        described = self._described()
        self.eos_id = self._special(described.get("eos_token"), END_TOKENS)
        self.bos_id = self._special(described.get("bos_token"), BEGIN_TOKENS)

    @cached_property
    def _model(self) -> Any:
        import tokenizers

        try:
            model = tokenizers.Tokenizer.from_file(str(self.path))
        except Exception as error:  # the library raises plain Exception
            raise UserError(f"{self.path} is not a tokenizer.json ({error}); save the tokenizer again with save_pretrained") from error
        # A document may contain the text of a special token; it must not become that token.
        model.encode_special_tokens = True
        model.no_truncation()
        model.no_padding()
        return model

    def rest(self) -> None:
        """See ``Tokenizer.rest``."""
        self.__dict__.pop("_model", None)
        give_back_memory()

    def _described(self) -> dict[str, Any]:
        path = self.path.with_name("tokenizer_config.json")
        return json.loads(path.read_text()) if path.is_file() else {}

    def _special(self, named: Any, usual: Sequence[str]) -> int | None:
        name = named.get("content") if isinstance(named, dict) else named
        for candidate in [name, *usual] if name else usual:
            if candidate in self._ids:
                return self._ids[candidate]
        return None

    @property
    def version(self) -> str:
        """See ``Tokenizer.version``."""
        return f"tokenizers {importlib.metadata.version('tokenizers')}"

    def normalize(self, text: str) -> str:
        """See ``Tokenizer.normalize``."""
        return self._model.normalizer.normalize_str(text) if self._model.normalizer else text

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """See ``Tokenizer.encode_batch``."""
        return [np.asarray(e.ids, dtype=np.int32) for e in self._model.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """See ``Tokenizer.decode``."""
        return self._model.decode([int(i) for i in ids], skip_special_tokens=True)


def _all_ids(description: dict[str, Any]) -> dict[str, int]:
    """Every token of a ``tokenizer.json`` with its id."""
    vocabulary = description["model"]["vocab"]
    ids = {piece: i for i, (piece, _) in enumerate(vocabulary)} if isinstance(vocabulary, list) else dict(vocabulary)
    return ids | {token["content"]: token["id"] for token in description.get("added_tokens") or []}


def _normalization(normalizer: dict[str, Any] | None) -> Literal["none", "nfc", "other"]:
    """Whether a ``tokenizer.json``'s normalizer changes letters; adding and replacing spaces does not count."""
    steps = [normalizer] if normalizer else []
    kinds: set[str] = set()
    while steps:
        step = steps.pop()
        kinds.add(step["type"])
        steps += step.get("normalizers", [])
    kinds -= {"Sequence", "Prepend", "Replace", "Strip"}
    return "none" if not kinds else "nfc" if kinds == {"NFC"} else "other"


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Opens a tokenizer file, or a folder that holds ``tokenizer.model`` or ``tokenizer.json``. Raises UserError when it is neither."""
    path = Path(path)
    if path.is_dir():
        for name in (HF_FILE, SENTENCEPIECE_FILE):
            if (path / name).is_file():
                return load_tokenizer(path / name)
        raise UserError(
            f"{path} holds neither {SENTENCEPIECE_FILE} nor {HF_FILE}; give a tokenizer's folder or train one with `mamba-data train-tokenizer`"
        )
    if not path.is_file():
        raise UserError(f"tokenizer {path} does not exist; train one with `mamba-data train-tokenizer`, or give a tokenizer.json")
    return HFTokenizer(path) if path.suffix == ".json" else SentencePieceTokenizer(path)
