"""Small synthetic tests of what a recurrent state can hold: induction, associative recall, needle in a haystack.

Each probe is a batch of made-up sequences whose answers can only be found in the sequence itself. They are drawn from a seeded generator on
the CPU: the same sequences for every model, device and engine. Untrained models answer by chance; attention and good Mamba models near 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from data_tools.errors import UserError
from mamba_pretrain.data.batch import IGNORE
from mamba_pretrain.training.scoring import token_losses


@dataclass(frozen=True, eq=False)
class Probe:
    """Sequences with answers. ``tokens`` (n, l) int64; ``labels`` (n, l) int64 are -100 except where an answer is expected."""

    name: str
    setting: dict[str, float]
    tokens: Tensor
    labels: Tensor


@dataclass(frozen=True)
class ProbeResult:
    """Share of answers whose likeliest token is the right one, and their mean loss in nats."""

    name: str
    setting: dict[str, float]
    accuracy: float
    loss: float
    n_answers: int


def induction(vocabulary: Tensor, length: int = 64, n: int = 32, seed: int = 0) -> Probe:
    """A random sequence of ``length`` tokens, given twice: the second time each token can be copied from behind its earlier occurrence.

    Olsson et al., "In-context Learning and Induction Heads", 2022. ``vocabulary`` (v,) holds the ids to draw from, at least ``length``.
    """
    segment = _distinct(vocabulary, n, length, seed)
    tokens = torch.cat([segment, segment], dim=1)
    labels = torch.full_like(tokens, IGNORE)
    labels[:, length:-1] = tokens[:, length + 1 :]
    return Probe("induction", {"length": length}, tokens, labels)


def associative_recall(vocabulary: Tensor, pairs: int = 16, n: int = 32, seed: int = 0) -> Probe:
    """``pairs`` keys, each followed by its value, and then all keys in another order: each asks for its value.

    Arora et al., "Zoology: Measuring and Improving Recall in Efficient Language Models", 2023 (multi-query associative recall).
    """
    drawn = _distinct(vocabulary, n, 2 * pairs, seed)
    keys, values = drawn[:, :pairs], drawn[:, pairs:]
    order = torch.rand(n, pairs, generator=torch.Generator().manual_seed(seed + 1)).argsort(dim=1)
    asked, answers = keys.gather(1, order), values.gather(1, order)
    tokens = torch.cat([_interleaved(keys, values), _interleaved(asked, answers)], dim=1)
    labels = torch.full_like(tokens, IGNORE)
    labels[:, 2 * pairs :: 2] = answers
    return Probe("associative_recall", {"pairs": pairs}, tokens, labels)


def needle(
    vocabulary: Tensor,
    length: int = 512,
    depth: float = 0.5,
    n: int = 16,
    seed: int = 0,
    haystack: Tensor | None = None,
    key_length: int = 4,
) -> Probe:
    """A key of ``key_length`` tokens and a value at ``depth`` (0: begin, 1: end) of a haystack, and the key again at its end.

    The haystack is random tokens, or taken from ``haystack`` (m,), tokens of real text, from places that ``seed`` draws. ``length`` counts
    everything that the model reads.
    """
    hay = length - 2 * key_length - 1
    if hay < 0 or not 0 <= depth <= 1:
        raise UserError(
            f"a needle at depth {depth:g} of {length} tokens is impossible; give a depth from 0 to 1 and a length of at least 9"
        )
    generator = torch.Generator().manual_seed(seed)
    drawn = _distinct(vocabulary, n, key_length + 1, seed + 1)
    if haystack is None:
        filler = vocabulary[torch.randint(len(vocabulary), (n, hay), generator=generator)]
    elif len(haystack) < hay:
        raise UserError(
            f"the haystack of {len(haystack)} tokens is shorter than the {hay} that the probe needs; give more text or a smaller length"
        )
    else:
        begin = torch.randint(len(haystack) - hay + 1, (n, 1), generator=generator)
        filler = haystack[begin + torch.arange(hay)]
    place = round(depth * hay)
    tokens = torch.cat([filler[:, :place], drawn, filler[:, place:], drawn[:, :key_length]], dim=1)
    labels = torch.full_like(tokens, IGNORE)
    labels[:, -1] = drawn[:, key_length]
    return Probe("needle", {"length": length, "depth": depth}, tokens, labels)


def standard_probes(
    vocabulary: Tensor, length: int, haystack: Tensor | None = None, depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0)
) -> list[Probe]:
    """The probes that fit into ``length`` tokens (at least 16) with the given vocabulary (v,)."""
    repeats = [size for size in (16, 64, 256) if 2 * size <= length and size <= len(vocabulary)]
    pairs = [count for count in (4, 16, 64) if 4 * count <= length and 2 * count <= len(vocabulary)]
    found = [induction(vocabulary, size) for size in repeats] + [associative_recall(vocabulary, count) for count in pairs]
    return found + [needle(vocabulary, length, depth, haystack=haystack) for depth in depths]


@torch.no_grad()
def run_probe(model: nn.Module, probe: Probe, device: torch.device | str = "cpu", batch_size: int = 8) -> ProbeResult:
    """Asks a ``LanguageModel`` on ``device``; each sequence is one document."""
    right, loss, answers = 0, 0.0, int((probe.labels != IGNORE).sum())
    for tokens, labels in zip(probe.tokens.split(batch_size), probe.labels.split(batch_size), strict=True):
        logits, labels = model(tokens.to(device)), labels.to(device)
        right += int((logits.argmax(-1) == labels).sum())  # no token is -100
        loss += float(token_losses(logits, labels).double().sum())
    return ProbeResult(probe.name, probe.setting, right / answers, loss / answers, answers)


def run_probes(model: nn.Module, probes: Iterable[Probe], device: torch.device | str = "cpu", batch_size: int = 8) -> list[ProbeResult]:
    """All of them, in order."""
    return [run_probe(model, probe, device, batch_size) for probe in probes]


def plain_vocabulary(vocab_size: int, special: Iterable[int] = ()) -> Tensor:
    """Ids to draw from: all of the tokenizer's but the special ones (end and begin of document, padding)."""
    kept = torch.ones(vocab_size, dtype=torch.bool)
    kept[list(special)] = False
    return kept.nonzero().squeeze(1)


def _distinct(vocabulary: Tensor, n: int, count: int, seed: int) -> Tensor:
    """(n, count) ids; those of a row differ."""
    if len(vocabulary) < count:
        raise UserError(f"a probe needs {count} different tokens, and the vocabulary has {len(vocabulary)}; make the probe smaller")
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([vocabulary[torch.randperm(len(vocabulary), generator=generator)[:count]] for _ in range(n)])


def _interleaved(left: Tensor, right: Tensor) -> Tensor:
    """(n, 2 m): columns of both (n, m) in turn."""
    return torch.stack([left, right], dim=2).flatten(1)
