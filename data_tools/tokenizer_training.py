"""Training a SentencePiece tokenizer on a sample of the corpus."""

from __future__ import annotations

import io
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_tools import folders
from data_tools.errors import UserError
from data_tools.parts import Task
from data_tools.readers import Problem, read_part
from data_tools.storage import write_whole
from data_tools.tokenizers import SENTENCEPIECE_FILE, SentencePieceTokenizer

HELD_OUT = 20  # every 20th document measures the result instead of training it
MAX_SENTENCE_BYTES = 16384


@dataclass(frozen=True)
class Trained:
    """The result: bytes of UTF-8 per token on documents that were not trained on."""

    path: Path
    documents: int
    bytes_per_token: float


def train_tokenizer(
    tasks: list[Task], out: Path, vocab_size: int, model: str, text_key: str, sample_bytes: int, seed: int, overwrite: bool
) -> Trained:
    """Trains ``model`` (bpe or unigram) with byte fallback, so that no text is unknown, on at most ``sample_bytes`` of text drawn with ``seed``.

    Raises UserError for an empty corpus, a vocabulary that the text cannot fill, or an output folder that holds files.
    """
    import sentencepiece

    folders.check_empty(out, overwrite)
    texts, held_out = _sample(tasks, text_key, sample_bytes, seed)
    if not texts:
        sources = ", ".join(sorted({part.path for task in tasks for part in task})[:3])
        raise UserError(f"the corpus holds no text to train on ({sources}); check the paths and --text-key")
    writer = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_pieces(texts),
            model_writer=writer,
            vocab_size=vocab_size,
            model_type=model,
            byte_fallback=True,
            character_coverage=0.9999,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            user_defined_symbols=["\n"],
            max_sentence_length=4 * MAX_SENTENCE_BYTES,
            num_threads=os.cpu_count() or 1,
            minloglevel=2,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
        )
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(
            f"a vocabulary of {vocab_size} cannot be trained on this text ({reason}); change --vocab-size or add text"
        ) from error
    folders.make(out)
    path = out / SENTENCEPIECE_FILE
    write_whole(path, writer.getvalue())
    tokenizer = SentencePieceTokenizer(path)
    tokens = sum(len(ids) for ids in tokenizer.encode_batch(held_out))
    size = sum(len(text.encode()) for text in held_out)
    return Trained(path, len(texts), size / max(1, tokens))


def _sample(tasks: list[Task], text_key: str, sample_bytes: int, seed: int) -> tuple[list[str], list[str]]:
    """Documents for training and for measuring. Of a corpus larger than the sample every task gives an equal share, in a random order."""
    order = list(range(len(tasks)))
    random.Random(seed).shuffle(order)
    total = sum(part.size for task in tasks for part in task)
    share = sample_bytes if total <= sample_bytes else -(-sample_bytes // len(tasks))
    texts: list[str] = []
    held_out: list[str] = []
    size = number = 0
    for task in (tasks[i] for i in order):
        taken = 0
        for text in _texts(task, text_key):
            number += 1
            (held_out if number % HELD_OUT == 0 else texts).append(text)
            taken += len(text)
            if taken >= share:
                break
        size += taken
        if size >= sample_bytes:
            break
    return texts, held_out or texts[:1]


def _texts(task: Task, text_key: str) -> Iterator[str]:
    for part in task:
        for text in read_part(part, text_key):
            if isinstance(text, Problem):
                raise UserError(f"{text.place} {text.what}; mend it, or train the tokenizer on other files")
            if text and not text.isspace():
                yield text


def _pieces(texts: list[str]) -> Iterator[str]:
    """Lines with their ends; the trainer passes over sentences that are too long, so those are cut."""
    for text in texts:
        for line in text.splitlines(keepends=True):
            for start in range(0, len(line), MAX_SENTENCE_BYTES):
                yield line[start : start + MAX_SENTENCE_BYTES]
