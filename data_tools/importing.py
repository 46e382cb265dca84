"""Token files of other tools: plain numpy dumps, datatrove's ``.ds``, Megatron pairs written elsewhere."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_tools import folders
from data_tools.errors import UserError
from data_tools.indexed import IndexedDataset, IndexedWriter, best_dtype, paths
from data_tools.manifest import Manifest, Shard, Split, TokenizerInfo
from data_tools.storage import file_hash
from data_tools.tokenizers import Tokenizer, load_tokenizer

TOKENS_AT_ONCE = 1 << 22
DTYPES = ("uint8", "uint16", "uint32", "int32", "int64")


@dataclass(frozen=True)
class Foreign:
    """Tokens of one file (a read-only map of it) and the end of each document, in tokens."""

    tokens: np.ndarray
    ends: np.ndarray


def import_tokens(
    files: list[Path], tokenizer_path: str, out: Path, split: str = "train", dtype: str | None = None, overwrite: bool = False
) -> Manifest:
    """Writes a dataset with one shard for each file: ``.npy`` and raw dumps (documents end with EOS), datatrove ``.ds``, Megatron ``.idx``.

    Raises UserError for a file that cannot be read, holds ids outside the vocabulary, or whose index does not fit.
    """
    folders.check_free(out, overwrite)
    tokenizer = load_tokenizer(tokenizer_path)
    work = folders.work_folder(out)
    if work.exists():
        raise UserError(f"{work} holds unfinished work; finish it with the command that began it, or delete it")
    try:
        shards = [_import(file, tokenizer, dtype, work, f"{split}/{number:05d}") for number, file in enumerate(files)]
        names = tokenizer.save(work / "tokenizer")
        info = TokenizerInfo(tokenizer.kind, tokenizer.hash, tokenizer.vocab_size, tokenizer.eos_id, tokenizer.bos_id, files=names)
        inputs = [{"path": str(file.resolve()), "size": file.stat().st_size, "xxh3": file_hash(str(file))} for file in files]
        counts = {"documents": sum(shard.documents for shard in shards), "tokens": sum(shard.tokens for shard in shards)}
        manifest = Manifest(info, {split: Split(shards)}, {"imported": True}, inputs, counts, " ".join(sys.argv))
        manifest.save(work)
        folders.publish(work, out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return manifest


def _import(file: Path, tokenizer: Tokenizer, dtype: str | None, work: Path, path: str) -> Shard:
    if not file.is_file():
        raise UserError(f"token file {file} does not exist; give .npy, .bin, .ds or .idx files")
    opener: Callable[[], Foreign] = {
        ".idx": lambda: _open_megatron(file),
        ".ds": lambda: _open_datatrove(file, dtype, tokenizer),
        ".npy": lambda: _open_numpy(file, tokenizer),
    }.get(file.suffix, lambda: _open_raw(file, dtype, tokenizer))
    foreign = opener()
    if not len(foreign.tokens):
        raise UserError(f"{file} holds no tokens; leave it out")
    with IndexedWriter(work / path, best_dtype(tokenizer.vocab_size)) as writer:
        begin = document = 0
        while begin < len(foreign.tokens):
            last = int(np.searchsorted(foreign.ends, begin + TOKENS_AT_ONCE))
            last = min(max(last, document + 1), len(foreign.ends))
            end = int(foreign.ends[last - 1])
            tokens = np.asarray(foreign.tokens[begin:end])
            if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < tokenizer.vocab_size:
                wrong = int(tokens.max()) if int(tokens.max()) >= tokenizer.vocab_size else int(tokens.min())
                raise UserError(
                    f"{file} holds the id {wrong}, outside the tokenizer's {tokenizer.vocab_size}; give its own tokenizer, or its true --dtype"
                )
            writer.add(tokens, np.diff(foreign.ends[document:last], prepend=begin))
            begin, document = end, last
    return Shard(path, writer.documents, writer.tokens, writer.dtype.name, writer.xxh3_bin, writer.xxh3_idx)


def _open_megatron(file: Path) -> Foreign:
    """A document of several sequences becomes one."""
    data = IndexedDataset(file.with_suffix(""))
    bin_path, _ = paths(file.with_suffix(""))
    tokens = np.memmap(bin_path, dtype=data.dtype, mode="r") if data.n_tokens else np.zeros(0, dtype=data.dtype)
    sequence_ends = np.concatenate([[0], np.cumsum(data.lengths, dtype=np.int64)])
    return Foreign(tokens, sequence_ends[data.documents[1:]])


def _open_datatrove(file: Path, dtype: str | None, tokenizer: Tokenizer) -> Foreign:
    """``.ds`` holds the ids, ``.ds.index`` the documents' ends (u64), ``.ds.metadata`` the bytes of an id behind a bar."""
    index, metadata = file.with_name(f"{file.name}.index"), file.with_name(f"{file.name}.metadata")
    if not index.is_file():
        raise UserError(f"{index} does not exist; copy it from where {file.name} was written")
    if dtype is None and metadata.is_file():
        size = metadata.read_text().splitlines()[0].rpartition("|")[2]
        dtype = {"2": "uint16", "4": "uint32"}.get(size)
    tokens = _map(file, dtype or ("uint32" if tokenizer.vocab_size > 1 << 16 else "uint16"))
    ends = np.fromfile(index, dtype="<u8").astype(np.int64)
    if not len(ends) or ends[-1] != len(tokens) or np.any(np.diff(ends, prepend=0) < 0):
        found = int(ends[-1]) if len(ends) else 0
        raise UserError(f"{index} ends at token {found}, but {file} holds {len(tokens)}; copy both again, or give the true --dtype")
    return Foreign(tokens, ends)


def _open_numpy(file: Path, tokenizer: Tokenizer) -> Foreign:
    try:
        tokens = np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"{file} is not an array that numpy.save wrote ({error}); write it again") from error
    if tokens.dtype.kind not in "ui":
        raise UserError(f"{file} holds {tokens.dtype} values, not token ids; write an array of integers")
    tokens = tokens.reshape(-1)
    return Foreign(tokens, _ends(tokens, tokenizer))


def _open_raw(file: Path, dtype: str | None, tokenizer: Tokenizer) -> Foreign:
    if dtype is None:
        raise UserError(f"{file} does not say how its ids are stored; pass --dtype, such as uint16")
    tokens = _map(file, dtype)
    return Foreign(tokens, _ends(tokens, tokenizer))


def _map(file: Path, dtype: str) -> np.ndarray:
    if dtype not in DTYPES:
        raise UserError(f"{dtype} is no way to store ids; give --dtype one of {', '.join(DTYPES)}")
    kind = np.dtype(dtype).newbyteorder("<")
    size = file.stat().st_size
    if size % kind.itemsize:
        raise UserError(f"{file} has {size} bytes, which is no whole number of {dtype} ids; copy it again, or give the true --dtype")
    return np.memmap(file, dtype=kind, mode="r") if size else np.zeros(0, dtype=kind)


def _ends(tokens: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """Dumps have no index: there a document ends with the end token, and nothing else can be known."""
    blocks = [np.zeros(0, dtype=np.int64)]
    for first in range(0, len(tokens), TOKENS_AT_ONCE):
        blocks.append(np.flatnonzero(tokens[first : first + TOKENS_AT_ONCE] == tokenizer.eos_id) + first + 1)
    ends = np.concatenate(blocks)
    return ends if len(ends) and ends[-1] == len(tokens) else np.append(ends, len(tokens))
