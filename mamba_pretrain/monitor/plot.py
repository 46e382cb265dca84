"""Line charts of braille dots for the terminal: two by four dots in each character cell."""

from __future__ import annotations

import math
from collections.abc import Sequence

# Bit of a braille character for the dot at (column, row) of its cell, top row first.
DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))


def braille_chart(values: Sequence[float | None], width: int, height: int) -> list[str]:
    """``height`` lines of ``width`` characters; values are spread over the width, the largest at the top.

    Returns empty lines when no value is finite. Values are clipped at the 1st and 99th percentile: one spike must not flatten all.
    """
    points = [(i, v) for i, v in enumerate(values) if v is not None and math.isfinite(v)]
    if not points or width < 1 or height < 1:
        return [" " * width] * height
    low, high = value_range([v for _, v in points])
    cells = [[0] * width for _ in range(height)]
    span = max(1, len(values) - 1)
    previous: tuple[int, int] | None = None
    for i, value in points:
        share = (min(max(value, low), high) - low) / (high - low) if high > low else 0.5
        dot = round(i / span * (2 * width - 1)), round((1 - share) * (4 * height - 1))
        for x, y in _between(previous, dot):
            cells[y // 4][x // 2] |= DOTS[x % 2][y % 4]
        previous = dot
    return ["".join(chr(0x2800 + bits) if bits else " " for bits in row) for row in cells]


def value_range(values: Sequence[float]) -> tuple[float, float]:
    """The 1st and 99th percentile."""
    ordered = sorted(values)
    last = len(ordered) - 1
    return ordered[round(0.01 * last)], ordered[round(0.99 * last)]


def _between(start: tuple[int, int] | None, end: tuple[int, int]) -> list[tuple[int, int]]:
    """The dots of a line from ``start`` (left out, None at the beginning) to ``end``."""
    if start is None:
        return [end]
    steps = max(abs(end[0] - start[0]), abs(end[1] - start[1]), 1)
    return [
        (start[0] + round((end[0] - start[0]) * i / steps), start[1] + round((end[1] - start[1]) * i / steps)) for i in range(1, steps + 1)
    ]
