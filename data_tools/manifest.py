"""``manifest.json``: what a dataset folder holds, where it came from, and the checksums that prove it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from data_tools.errors import UserError
from data_tools.storage import write_whole

FILE_NAME = "manifest.json"
FORMAT = 1
SPLITS = ("train", "validation")


@dataclass
class TokenizerInfo:
    """The tokenizer whose ids the shards hold."""

    kind: str
    hash: str
    vocab_size: int
    eos_id: int | None
    bos_id: int | None
    encoder: str = ""
    encoder_version: str = ""
    files: list[str] = field(default_factory=list)


@dataclass
class Shard:
    """One ``.bin``/``.idx`` pair, ``path`` relative to the dataset folder without the suffix."""

    path: str
    documents: int
    tokens: int
    dtype: str
    xxh3_bin: str
    xxh3_idx: str
    text_bytes: int = 0


@dataclass
class Split:
    """The shards of one split, in order."""

    shards: list[Shard] = field(default_factory=list)

    @property
    def documents(self) -> int:
        """Documents in all shards."""
        return sum(shard.documents for shard in self.shards)

    @property
    def tokens(self) -> int:
        """Tokens in all shards."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def text_bytes(self) -> int:
        """UTF-8 bytes of the text behind the tokens."""
        return sum(shard.text_bytes for shard in self.shards)


@dataclass
class Manifest:
    """The whole file.

    ``plan`` names the work that made it (see ``pipeline``). ``fingerprint`` depends on the tokens and the tokenizer only, not on paths, times or
    worker counts.
    """

    tokenizer: TokenizerInfo
    splits: dict[str, Split]
    policies: dict[str, Any] = field(default_factory=dict)
    inputs: list[dict[str, Any]] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    command: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    plan: str = ""
    format: int = FORMAT

    @property
    def fingerprint(self) -> str:
        """Hash over the tokenizer and every shard's checksum, in order."""
        digest = hashlib.sha256(self.tokenizer.hash.encode())
        for name in sorted(self.splits):
            for shard in self.splits[name].shards:
                digest.update(f"{name}:{shard.documents}:{shard.tokens}:{shard.xxh3_bin}:{shard.xxh3_idx};".encode())
        return digest.hexdigest()[:32]

    def save(self, folder: Path) -> None:
        """Writes the file whole or not at all."""
        body = {**asdict(self), "fingerprint": self.fingerprint}
        write_whole(folder / FILE_NAME, json.dumps(body, indent=1).encode() + b"\n")

    @classmethod
    def load(cls, folder: str | Path) -> Manifest:
        """Reads a dataset folder's manifest. Raises UserError when the folder is no dataset or the file is damaged."""
        path = Path(folder) / FILE_NAME
        if not path.is_file():
            raise UserError(
                f"{folder} is not a dataset: it holds no {FILE_NAME}; make one with `mamba-data tokenize TEXT --tokenizer T --output {folder}`"
            )
        try:
            body = json.loads(path.read_text())
            if body.pop("format") != FORMAT:
                raise UserError(f"{path} is of another version of this format; tokenize again")
            recorded = body.pop("fingerprint")
            splits = {name: Split([Shard(**shard) for shard in split["shards"]]) for name, split in body.pop("splits").items()}
            manifest = cls(tokenizer=TokenizerInfo(**body.pop("tokenizer")), splits=splits, **body)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged ({error}); restore it or tokenize again") from error
        if manifest.fingerprint != recorded:
            raise UserError(f"{path} was changed by hand: its fingerprint does not fit its shards; restore it or tokenize again")
        return manifest


def xxh3(path: Path) -> str:
    """Checksum of a file, read in pieces."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
