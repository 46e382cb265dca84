"""What a run is about to read: its dataset and, where it goes on from one, its last checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from mamba_pretrain.doctor.check import Check, green, grey, red

if TYPE_CHECKING:
    from data_tools.manifest import Manifest
    from mamba_pretrain.config import RunConfig

PROBE_TEXT = "def f(x): return x + 1  # naïve 数字 🙂"


def checkpoint(run_dir: Path) -> Iterator[Check]:
    """Whether the last checkpoint is whole: every file there, of its size, with its checksum."""
    from mamba_pretrain.checkpoint.reading import latest_step, list_checkpoints, read_manifest

    root = run_dir / "checkpoints"
    entries = list_checkpoints(root)
    step = latest_step(root)
    if step is None:
        why = "none yet: training starts anew" if not entries else f"{len(entries)} unfinished, none complete: training starts anew"
        yield grey("checkpoint", why)
        return
    folder = next(entry.folder for entry in entries if entry.step == step and entry.complete)
    problem = read_manifest(folder).problem()
    if problem is not None:
        others = [entry.step for entry in entries if entry.complete and entry.step != step]
        go_on = f"training then goes on from step {max(others)}" if others else "training then starts anew"
        yield red("checkpoint", problem, f"remove the damaged folder (rm -r {folder}); {go_on}")
    else:
        yield green("checkpoint", f"step {step} is complete and its checksums are right")


def dataset(path: Path, model_vocab: int | None = None) -> Iterator[Check]:
    """Whether a dataset's shards are whole, fit the tokenizer beside them, and the ids fit the model."""
    from data_tools.indexed import IndexedDataset
    from data_tools.manifest import Manifest

    name = f"dataset {path}"
    manifest = Manifest.load(path)
    vocab = manifest.tokenizer.vocab_size
    if model_vocab is not None and model_vocab < vocab:
        mend = f"set model.vocab_size={vocab}, or tokenize again with the tokenizer that belongs to the model"
        yield red(name, f"its tokenizer has {vocab} ids but the model only {model_vocab}", mend)
        return
    yield from _tokenizer(name, path, manifest)
    again = f"tokenize again (mamba-data verify {path} lists every damaged shard)"
    tokens = 0
    for split, content in manifest.splits.items():
        for shard in content.shards:
            reader = IndexedDataset(path / shard.path)
            tokens += shard.tokens
            head = reader.read(0, min(shard.tokens, 1 << 16))
            reader.close()
            if head.size and int(head.max()) >= vocab:
                yield red(name, f"{split} shard {shard.path} holds id {int(head.max())}, but the tokenizer ends at {vocab - 1}", again)
                return
    yield green(
        name, f"{tokens:,} tokens in {sum(len(s.shards) for s in manifest.splits.values())} shards, ids within the vocabulary of {vocab}"
    )


def _tokenizer(name: str, path: Path, manifest: Manifest) -> Iterator[Check]:
    """Whether the tokenizer kept with a dataset is the one that made it, and gives text back as it was."""
    from data_tools.tokenizers import load_tokenizer

    folder = path / "tokenizer"
    if not folder.is_dir():
        yield red(name, "the tokenizer's files are missing: samples and exports will have no text", f"copy them to {folder}")
        return
    tokenizer = load_tokenizer(folder)
    if tokenizer.hash != manifest.tokenizer.hash:
        mend = "put the original tokenizer back, or tokenize again with the one that lies there now"
        yield red(name, f"{folder} holds another tokenizer than the one that made the shards: ids would mean other text", mend)
        return
    decoded = tokenizer.decode(tokenizer.encode(PROBE_TEXT))
    if decoded.split() != PROBE_TEXT.split():
        mend = "use a tokenizer with byte fallback (mamba-data train-tokenizer makes one)"
        yield red(name, f"its tokenizer does not give text back: {PROBE_TEXT!r} becomes {decoded!r}", mend)


def run_inputs(config: RunConfig) -> Iterator[Check]:
    """The datasets of a config."""
    for source in config.data.sources:
        if "://" in source.path:
            yield grey(f"dataset {source.path}", "behind a URL: checked when training opens it")
            continue
        yield from dataset(Path(source.path), config.model.vocab_size)
