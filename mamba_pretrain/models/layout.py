"""Translating a state dict between our names and another format's: one table, read in both directions."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from data_tools.errors import UserError
from mamba_pretrain.models.config import ModelConfig

StateDict = dict[str, Tensor]


@dataclass(frozen=True)
class Entry:
    """One of our tensors and the tensors of the other format that hold it; ``split`` and ``join`` are inverse to each other."""

    ours: str
    theirs: tuple[str, ...]
    split: Callable[[Tensor], Iterable[Tensor]] = lambda t: (t,)
    join: Callable[[list[Tensor]], Tensor] = lambda ts: ts[0]


def same(ours: str, theirs: str) -> Entry:
    """The same tensor under another name."""
    return Entry(ours, (theirs,))


def conv_weight(ours: str, theirs: str) -> Entry:
    """Our (channels, taps) as ``nn.Conv1d``'s (channels, 1, taps)."""
    return Entry(ours, (theirs,), lambda t: (t.unsqueeze(1),), lambda ts: ts[0].squeeze(1))


def stacked(ours: str, theirs: tuple[str, ...], sizes: tuple[int, ...]) -> Entry:
    """Our one matrix as several, of ``sizes`` rows each."""
    return Entry(ours, theirs, lambda t: t.split(sizes), torch.cat)


def vocabulary_rows(ours: str, theirs: str, config: ModelConfig) -> Entry:
    """A token table without its padding rows: nobody else knows that they must get no probability. They come back as zeros."""
    padding = config.padded_vocab_size - config.vocab_size

    def join(tensors: list[Tensor]) -> Tensor:
        return torch.nn.functional.pad(tensors[0], (0, 0, 0, padding)) if padding else tensors[0]

    return Entry(ours, (theirs,), lambda t: (t[: config.vocab_size],), join)


def translate_out(state: StateDict, table: list[Entry]) -> StateDict:
    """Our state dict in the other format; tensors are contiguous and own their whole storage, as safetensors wants."""
    return {name: _owned(part) for entry in table for name, part in zip(entry.theirs, entry.split(state[entry.ours]), strict=True)}


def _owned(t: Tensor) -> Tensor:
    whole = t.is_contiguous() and t.untyped_storage().nbytes() == t.nbytes
    return t if whole else t.clone(memory_format=torch.contiguous_format)


def translate_in(state: StateDict, table: list[Entry], shapes: dict[str, tuple[int, ...]], source: str) -> StateDict:
    """The other format's state dict in ours, fp32. Raises UserError when a tensor is missing, unknown or has another shape."""
    wanted = {name for entry in table for name in entry.theirs}
    for names, word in ((wanted - state.keys(), "lacks"), (state.keys() - wanted, "has the unknown")):
        if names:
            raise UserError(f"{source} {word} tensor {min(names)} (of {len(names)}); its config.json does not describe these weights")
    ours = {}
    for entry in table:
        full = entry.join([state[name].float() for name in entry.theirs]).contiguous()
        if tuple(full.shape) != shapes[entry.ours]:
            expected = shapes[entry.ours]
            raise UserError(
                f"{source}: tensor {entry.theirs[0]} gives {entry.ours} the shape {tuple(full.shape)}, its config.json {expected}"
            )
        ours[entry.ours] = full
    return ours
