"""Small corpora and tokenizers, and the command line in this process."""

from __future__ import annotations

import random
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import orjson
import pytest

from data_tools.cli import main
from data_tools.manifest import Manifest


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forcing data to disk guards against power cuts, which no test here makes; it takes most of a small run's time."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Real documents of many lengths, some not ASCII: pieces of the standard library's source."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    whole = [path.read_text(encoding="utf-8") for path in sorted(stdlib.glob("*.py"))[:45]]
    rng = random.Random(0)
    found = []
    for text in whole:
        while text:
            size = int(rng.lognormvariate(6, 1.2)) + 1
            found.append(text[:size])
            text = text[size:]
    words = ["naïve", "e\u0301clair", "日本語", "Ω≈ç√", "<|endoftext|>", "</s>", "🤖"]
    found = [text + rng.choice(words) if rng.random() < 0.2 else text for text in found]
    return [text for text in found if not text.isspace()]


@pytest.fixture(scope="session")
def tokenizers(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A SentencePiece model and a byte-level ``tokenizer.json`` with NFC, both with control tokens whose text stands in ``texts``."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    from data_tools.sources import find_files, plan_tasks
    from data_tools.tokenizer_training import train_tokenizer as train

    root = tmp_path_factory.mktemp("tokenizers")
    source = root / "text.jsonl"
    source.write_bytes(b"\n".join(orjson.dumps({"text": text}) for text in texts[:400]))
    train(plan_tasks(find_files([str(source)], [], [])), root / "sentencepiece", 700, "bpe", "text", 1 << 20, 0, False)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=["<|endoftext|>", "<|padding|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts[:400], trainer)
    (root / "hf").mkdir()
    tokenizer.save(str(root / "hf" / "tokenizer.json"))
    return {"sentencepiece": root / "sentencepiece", "hf": root / "hf"}


@dataclass
class Result:
    """What a command printed, and its exit code."""

    code: int
    out: str
    err: str


@pytest.fixture
def mamba_data(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Runs ``mamba-data`` with arguments in this process."""

    def run(*arguments: object) -> Result:
        capsys.readouterr()
        code = 0
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return run


@pytest.fixture
def write_jsonl() -> Callable[[Path, list[str]], Path]:
    """Writes texts as JSONL."""

    def write(path: Path, texts: list[str]) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"".join(orjson.dumps({"text": text}) + b"\n" for text in texts))
        return path

    return write


@pytest.fixture(scope="session")
def checksums() -> Callable[[Path], dict[str, str]]:
    """Every shard file's checksum, read from disk."""
    from data_tools.manifest import xxh3

    def of(folder: Path) -> dict[str, str]:
        Manifest.load(folder)
        return {str(path.relative_to(folder)): xxh3(path) for path in sorted(folder.glob("*/*.*")) if path.suffix in (".bin", ".idx")}

    return of


@pytest.fixture
def small_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cuts inputs into many small tasks, so that small corpora exercise what large ones need. Processes that are spawned never cut."""
    monkeypatch.setattr("data_tools.sources.SMALLEST_TASK", 1 << 17)
    monkeypatch.setattr("data_tools.sources.HASH_BLOCK", 1 << 17)
    monkeypatch.setattr("data_tools.storage.HASH_BLOCK", 1 << 17)
