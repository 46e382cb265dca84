"""Which source each sample comes from: exact shares over a period, no state but integers."""

from __future__ import annotations

from fractions import Fraction
from math import lcm
from typing import Any

import numpy as np

LONGEST_PERIOD = 10_000


class Blend:
    """Assigns the samples of a run to sources in the ratio of ``weights``.

    Within every period each source gets its exact number of samples, spread as evenly as integers allow: after any number of samples, no source
    is more than about one sample away from its share.
    """

    def __init__(self, weights: list[float]) -> None:
        """Weights are positive; ratios that need a period of over 10,000 samples are rounded to one of 10,000."""
        self.quotas = _quotas(weights)
        self.period = sum(self.quotas)
        self._pattern = _spread(self.quotas)
        before = np.zeros((len(weights), self.period + 1), dtype=np.int64)
        for source in range(len(weights)):
            np.cumsum(self._pattern == source, out=before[source, 1:])
        self._before = before

    def sources(self, first: int, count: int) -> np.ndarray:
        """The source of each of the samples [first, first + count)."""
        return self._pattern[np.arange(first, first + count, dtype=np.int64) % self.period]

    def cursors(self, sample: int) -> list[int]:
        """How many of the first ``sample`` samples came from each source."""
        periods, rest = divmod(sample, self.period)
        return [periods * quota + int(self._before[source, rest]) for source, quota in enumerate(self.quotas)]


def _quotas(weights: list[float]) -> list[int]:
    total = sum(Fraction(str(weight)) for weight in weights)
    shares = [Fraction(str(weight)) / total for weight in weights]
    period = lcm(*(share.denominator for share in shares))
    if period <= LONGEST_PERIOD:
        return [int(share * period) for share in shares]
    exact = [share * LONGEST_PERIOD for share in shares]
    quotas = [max(1, int(value)) for value in exact]
    by_remainder = sorted(range(len(weights)), key=lambda i: (int(exact[i]) - exact[i], i))
    for source in by_remainder[: max(0, LONGEST_PERIOD - sum(quotas))]:
        quotas[source] += 1
    return quotas


def _spread(quotas: list[int]) -> np.ndarray:
    """The period as a list of sources: at each place the one that is furthest behind its share."""
    share = np.array(quotas, dtype=np.float64) / sum(quotas)
    given = np.zeros(len(quotas))
    pattern = np.empty(sum(quotas), dtype=np.int32)
    for i in range(len(pattern)):
        behind = np.where(given < quotas, share * (i + 1) - given, -np.inf)
        pattern[i] = source = int(np.argmax(behind))
        given[source] += 1
    return pattern


class BlendSchedule:
    """The blends of a run one after another: a blend may change at a resume without repeating or losing a sample of any source.

    Each segment begins at a sample of the run, with the number of samples every source had given by then.
    """

    def __init__(self, names: list[str], weights: list[float]) -> None:
        self._segments = [{"first": 0, "weights": dict(zip(names, weights, strict=True)), "cursors": dict.fromkeys(names, 0)}]
        self._blends = [Blend(weights)]

    def locate(self, first: int, count: int) -> list[tuple[str, int]]:
        """(source, cursor) of each of the samples [first, first + count): the cursor counts the source's samples over the whole run."""
        located: list[tuple[str, int]] = []
        starts = [segment["first"] for segment in self._segments[1:]] + [first + count]
        for segment, blend, end in zip(self._segments, self._blends, starts, strict=True):
            begin, stop = max(first, segment["first"]), min(first + count, end)
            if begin >= stop:
                continue
            names = list(segment["weights"])
            given = blend.cursors(begin - segment["first"])
            cursor = [segment["cursors"][name] + n for name, n in zip(names, given, strict=True)]
            for source in blend.sources(begin - segment["first"], stop - begin):
                located.append((names[source], cursor[source]))
                cursor[source] += 1
        return located

    def cursors(self, sample: int) -> dict[str, int]:
        """Samples that each source ever used has given before ``sample``."""
        total: dict[str, int] = {}
        for segment, blend in zip(self._segments, self._blends, strict=True):
            if segment["first"] <= sample:
                total |= segment["cursors"]
                given = blend.cursors(sample - segment["first"])
                total |= {name: segment["cursors"][name] + n for name, n in zip(segment["weights"], given, strict=True)}
        return total

    def change(self, sample: int, weights: dict[str, float]) -> bool:
        """Uses other weights or sources from ``sample`` on; False if they are those in force. Later segments are dropped."""
        kept = [i for i, segment in enumerate(self._segments) if segment["first"] < sample or i == 0]
        self._segments, self._blends = [self._segments[i] for i in kept], [self._blends[i] for i in kept]
        if self._segments[-1]["weights"] == weights:
            return False
        cursors = self.cursors(sample)
        segment = {"first": sample, "weights": dict(weights), "cursors": {**cursors, **{n: cursors.get(n, 0) for n in weights}}}
        if sample == self._segments[-1]["first"]:
            self._segments.pop()
            self._blends.pop()
        self._segments.append(segment)
        self._blends.append(Blend(list(weights.values())))
        return True

    def state(self) -> list[dict[str, Any]]:
        """Plain data."""
        return [dict(segment) for segment in self._segments]

    def load(self, state: list[dict[str, Any]]) -> None:
        """Continues from ``state()``."""
        self._segments = [dict(segment) for segment in state]
        self._blends = [Blend(list(segment["weights"].values())) for segment in state]
