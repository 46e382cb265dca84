"""A run's tokenizer as files that transformers' ``AutoTokenizer`` loads, giving the ids of training."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_tools.sentencepiece_export import read_proto, to_tokenizers
from data_tools.tokenizers import SENTENCEPIECE_FILE, Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer as FastTokenizer

_CONFIG = "tokenizer_config.json"


def export_tokenizer(source: Path, out: Path) -> dict[str, Any]:
    """Writes the tokenizer of folder ``source`` into ``out``; returns the model config's ``bos_token_id`` and ``eos_token_id``.

    A Hugging Face tokenizer with a configuration of its own is copied as it is. Others get one in which, as in training, the text of a
    special token is text. Raises UserError for a SentencePiece model that the ``tokenizers`` library cannot express.
    """
    tokenizer = load_tokenizer(source)
    if tokenizer.kind == "sentencepiece":
        proto = read_proto(tokenizer.path)
        _wrap(to_tokenizers(proto, str(tokenizer.path)), tokenizer, proto.trainer_spec.unk_piece, out)
        shutil.copyfile(tokenizer.path, out / SENTENCEPIECE_FILE)
    elif tokenizer.path.with_name(_CONFIG).is_file():
        tokenizer.save(out)
    else:
        from tokenizers import Tokenizer as FastTokenizer

        _wrap(FastTokenizer.from_file(str(tokenizer.path)), tokenizer, None, out)
    return {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}


def _wrap(fast: FastTokenizer, tokenizer: Tokenizer, unknown: str | None, out: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    ends = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
    named = {role: fast.id_to_token(token) for role, token in ends.items() if token is not None}
    if unknown is not None:
        named["unk_token"] = unknown
    PreTrainedTokenizerFast(tokenizer_object=fast, split_special_tokens=True, clean_up_tokenization_spaces=False, **named).save_pretrained(
        out
    )
