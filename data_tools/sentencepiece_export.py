"""A SentencePiece model as a ``tokenizers`` tokenizer that gives the same ids, for ``AutoTokenizer``.

transformers' own conversion guesses a model family and with it normalisation, dummy prefix and byte fallback; here the model's own settings
decide.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_tools.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_SPACE = "\u2581"  # SentencePiece's visible space
_UNIGRAM, _BPE = 1, 2  # TrainerSpec.ModelType
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # ModelProto.SentencePiece.Type
_NEVER = -1e6  # score of a piece that text must not match


def read_proto(path: Path) -> Any:
    """The parsed model file. Raises UserError for another kind of file."""
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    proto: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]  # generated at import
    try:
        proto.ParseFromString(path.read_bytes())
    except DecodeError as error:
        raise UserError(f"{path} is not a SentencePiece model; give the .model file that its trainer wrote") from error
    return proto


def to_tokenizers(proto: Any, source: str) -> Tokenizer:
    """The same tokenizer in the ``tokenizers`` library. Raises UserError for settings that it cannot express.

    Two rare differences are left, both of unigram models: where the vocabulary lacks one of the letters of ``<s>``, that literal text becomes
    the token; and in texts of over ten thousand tokens SentencePiece's fp32 sums decide near-ties differently.
    """
    from tokenizers import AddedToken, Tokenizer, decoders

    normalizer = proto.normalizer_spec
    if proto.trainer_spec.treat_whitespace_as_suffix or not normalizer.escape_whitespaces:
        raise UserError(f"{source} puts spaces behind words or leaves them unescaped; such a SentencePiece model cannot be exported")
    tokenizer = Tokenizer(_model(proto, source))
    # SentencePiece looks for user-defined symbols in normalised text, where one with a plain space never stands.
    symbols = [p.piece for p in proto.pieces if p.type == _USER_DEFINED and " " not in p.piece]
    tokenizer.normalizer = _normalizer(normalizer, symbols)
    leading = 1 if normalizer.add_dummy_prefix or normalizer.remove_extra_whitespaces else 0
    steps: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", leading, 0)] if leading else steps)
    tokenizer.add_special_tokens([AddedToken(p.piece, special=True, normalized=False) for p in proto.pieces if p.type == _CONTROL])
    if proto.trainer_spec.model_type == _UNIGRAM and any(set(symbol) == {_SPACE} for symbol in symbols):
        raise UserError(
            f"{source} is a unigram model with user-defined runs of spaces, which only SentencePiece splits its way; use bpe instead"
        )
    if proto.trainer_spec.model_type == _BPE:
        tokenizer.add_tokens([AddedToken(symbol, special=False, normalized=True) for symbol in symbols])
    tokenizer.encode_special_tokens = True  # as in SentencePiece, "<s>" in a text is four letters, not the control token
    return tokenizer


def _model(proto: Any, source: str) -> Any:
    from tokenizers import models

    trainer = proto.trainer_spec
    if trainer.model_type == _UNIGRAM:
        return models.Unigram(_scores(proto), unk_id=trainer.unk_id, byte_fallback=trainer.byte_fallback)
    if trainer.model_type != _BPE:
        raise UserError(f"{source} is a word or character model; only unigram and bpe SentencePiece models can be exported")
    ids = {p.piece: i for i, p in enumerate(proto.pieces)}
    return models.BPE(ids, _merges(proto, ids), unk_token=trainer.unk_piece, fuse_unk=True, byte_fallback=trainer.byte_fallback)


def _scores(proto: Any) -> list[tuple[str, float]]:
    """Unigram scores as SentencePiece's search uses them: a user-defined symbol beats all else, a control or byte piece is never text."""
    scores = {_NORMAL: lambda p: p.score, _USER_DEFINED: lambda p: 0.0}
    return [(p.piece, scores.get(p.type, lambda p: _NEVER)(p)) for p in proto.pieces]


def _merges(proto: Any, ids: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to make a piece of two others, best piece first: SentencePiece merges by score, ``tokenizers`` by position in this list."""
    merges: list[tuple[float, int, tuple[str, str]]] = []
    for number, piece in enumerate(proto.pieces):
        text = piece.piece if piece.type == _NORMAL else ""
        parts = ((text[:i], text[i:]) for i in range(1, len(text)))
        merges += [(-piece.score, number, part) for part in parts if part[0] in ids and part[1] in ids]
    return [part for _, _, part in sorted(merges, key=lambda merge: merge[:2])]


def _normalizer(spec: Any, symbols: list[str]) -> Any:
    import re

    from tokenizers import Regex, normalizers

    steps: list[Any] = [normalizers.Precompiled(spec.precompiled_charsmap)] if spec.precompiled_charsmap else []
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(" {2,}"), " "), normalizers.Replace(Regex("^ | $"), "")]
    steps.append(normalizers.Replace(" ", _SPACE))
    if spec.add_dummy_prefix:
        # `tokenizers` normalises the symbols themselves too, to look for the result; they must stay without the prefix.
        whole = "|".join(re.escape(symbol) for symbol in symbols)
        steps.append(normalizers.Replace(Regex(rf"\A(?!({whole})\z)(?=.|\n)" if symbols else r"\A(?=.|\n)"), _SPACE))
    return normalizers.Sequence(steps)
