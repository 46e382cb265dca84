"""Numbers as people read them: short, and of steady width."""

from __future__ import annotations

import math
from collections.abc import Sequence

BARS = "▁▂▃▄▅▆▇█"


def si(value: float | None, digits: int = 1) -> str:
    """A count with k, M, G or T: ``161876 -> 161.9k``; ``-`` when unknown."""
    if value is None or not math.isfinite(value):
        return "-"
    for limit, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.{digits}f}{suffix}"
    return f"{value:.0f}" if value == int(value) else f"{value:.{digits}f}"


def duration(seconds: float | None) -> str:
    """``45s``, ``12m05s``, ``9h12m``, ``3d04h``; ``-`` when unknown."""
    if seconds is None or not math.isfinite(seconds):
        return "-"
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def gigabytes(n_bytes: float | None, digits: int = 1) -> str:
    """Bytes in GB (1e9 bytes), as everywhere in this project."""
    return "-" if n_bytes is None else f"{n_bytes / 1e9:,.{digits}f} GB"


def percent(share: float | None, digits: int = 1) -> str:
    """A share of one as a percentage; ``-`` when unknown."""
    return "-" if share is None or not math.isfinite(share) else f"{100 * share:.{digits}f}%"


def number(value: float | None, format_spec: str = ".4f") -> str:
    """A number in the given format; ``-`` when it is None (not finite values are stored as null)."""
    return "-" if value is None else format(value, format_spec)


def sparkline(values: Sequence[float | None], width: int) -> str:
    """A curve of block characters at most ``width`` wide; each is the mean of the values it covers."""
    finite = [v for v in values if v is not None and math.isfinite(v)]
    if not finite or width < 1:
        return ""
    size = max(1.0, len(finite) / width)
    means = []
    for i in range(min(width, len(finite))):
        part = finite[int(i * size) : max(int(i * size) + 1, int((i + 1) * size))]
        means.append(sum(part) / len(part))
    low, high = min(means), max(means)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((mean - low) * scale)] for mean in means)
