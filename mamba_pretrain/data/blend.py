"""Which source gives which sample of the run, with integers only.

The weights become whole shares of a period. Inside a period the sources are spread evenly, every period is the same, and so the source of
global sample i and the number of samples that source gave before are table look-ups. A blend that changes between runs adds a segment to
the schedule: the new one begins where the old one stopped, and each source's cursor goes on from where it stood.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

import numpy as np

MAX_PERIOD = 100_000  # fractions with a longer exact period are rounded to multiples of 1 / MAX_PERIOD


def whole_shares(weights: Sequence[float]) -> list[int]:
    """Samples of each source in one period: the weights' exact proportions, or the nearest of a period of ``MAX_PERIOD``.

    Every source gets at least one sample. Weights are read as the decimals they are written as: 0.1 is one tenth.
    """
    parts = [Fraction(str(weight)) for weight in weights]
    fractions = [part / sum(parts) for part in parts]
    period = math.lcm(*(fraction.denominator for fraction in fractions))
    if period <= MAX_PERIOD:
        return [int(fraction * period) for fraction in fractions]
    shares = [max(1, int(fraction * MAX_PERIOD)) for fraction in fractions]
    missing = sorted(range(len(shares)), key=lambda s: fractions[s] * MAX_PERIOD - shares[s], reverse=True)
    for source in missing[: max(0, MAX_PERIOD - sum(shares))]:
        shares[source] += 1
    divisor = math.gcd(*shares)
    return [share // divisor for share in shares]


@lru_cache(maxsize=16)
def period_table(shares: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """One period: the source (P,) of each sample and the number (P,) of that source's samples before it in the period.

    Sample j of a source with share c stands at time (j + 1/2) / c; sorting all of them spreads every source evenly.
    """
    source = np.repeat(np.arange(len(shares)), shares)
    rank = np.concatenate([np.arange(share) for share in shares])
    order = np.lexsort((source, (rank + 0.5) / np.asarray(shares)[source]))
    return source[order], rank[order]


@dataclass(frozen=True)
class Segment:
    """A stretch of the run with one blend. ``start``: its first global sample. ``shares``: samples of each source in a period.

    ``cursors``: samples that each source (also one no longer in the blend) had given before ``start``.
    """

    start: int
    shares: dict[str, int]
    cursors: dict[str, int]

    def place(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source number (in the order of ``shares``) and draw of that source, each (m,), of global samples (m,)."""
        source, rank = period_table(tuple(self.shares.values()))
        periods, offset = np.divmod(samples - self.start, len(source))
        per_period = np.array(list(self.shares.values()))
        before = np.array([self.cursors.get(name, 0) for name in self.shares])
        chosen = source[offset]
        return chosen, before[chosen] + periods * per_period[chosen] + rank[offset]

    def cursors_at(self, sample: int) -> dict[str, int]:
        """Samples that each source has given before global sample ``sample``."""
        source, _ = period_table(tuple(self.shares.values()))
        periods, offset = divmod(sample - self.start, len(source))
        in_part = np.bincount(source[:offset], minlength=len(self.shares))
        given = {name: periods * share + int(part) for (name, share), part in zip(self.shares.items(), in_part, strict=True)}
        return self.cursors | {name: self.cursors.get(name, 0) + count for name, count in given.items()}


class BlendSchedule:
    """The blends of a run, oldest first. Sources are named by their dataset's fingerprint."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self.segments = list(segments)

    @classmethod
    def constant(cls, weights: dict[str, float]) -> BlendSchedule:
        """One blend from the first sample on."""
        return cls([Segment(0, named_shares(weights), {})])

    def followed_by(self, weights: dict[str, float], at: int) -> BlendSchedule:
        """The same schedule up to global sample ``at``, the blend of ``weights`` from there; itself if that is the blend already."""
        last = self.segments[-1]
        shares = named_shares(weights)
        if shares == last.shares:
            return self
        return BlendSchedule([*(s for s in self.segments if s.start < at), Segment(at, shares, self._segment_at(at).cursors_at(at))])

    def place(self, samples: np.ndarray) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        """(source, rows, draws) for each source among global samples (m,): ``rows`` index ``samples``, ``draws`` count the source's own."""
        starts = np.array([segment.start for segment in self.segments])
        segment_of = np.searchsorted(starts, samples, side="right") - 1
        for number in np.unique(segment_of):
            rows = np.flatnonzero(segment_of == number)
            segment = self.segments[number]
            chosen, draws = segment.place(samples[rows])
            for source, name in enumerate(segment.shares):
                mine = chosen == source
                if mine.any():
                    yield name, rows[mine], draws[mine]

    def cursors_at(self, sample: int) -> dict[str, int]:
        """Samples that each source has given before global sample ``sample``."""
        return self._segment_at(sample).cursors_at(sample)

    def _segment_at(self, sample: int) -> Segment:
        return next(segment for segment in reversed(self.segments) if segment.start <= sample)

    def state(self) -> list[dict[str, Any]]:
        """Plain integers and names for a checkpoint."""
        return [{"start": s.start, "shares": dict(s.shares), "cursors": dict(s.cursors)} for s in self.segments]

    @classmethod
    def from_state(cls, state: list[dict[str, Any]]) -> BlendSchedule:
        """The schedule saved by ``state``."""
        return cls([Segment(**segment) for segment in state])


def named_shares(weights: dict[str, float]) -> dict[str, int]:
    """Shares by source, in the order of the names: how a config lists its sources does not matter."""
    names = sorted(weights)
    return dict(zip(names, whole_shares([weights[name] for name in names]), strict=True))
