"""The run on the console: one live line on a terminal, plain lines of at most 100 columns in a log."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from mamba_pretrain.monitor.metrics import Row
from mamba_pretrain.monitor.text import duration, number, percent, si

COLUMNS = 100


class ConsoleSink:
    """Prints train rows, evaluations, samples and events."""

    def __init__(self, total_steps: int, style: str = "auto", stream: Any = None) -> None:
        """``style``: auto (rich if the stream is a terminal), rich or plain. ``stream`` defaults to standard output."""
        self._total_steps = total_steps
        self._stream = stream or sys.stdout
        self._live = LiveLine(total_steps, self._stream) if style == "rich" or (style == "auto" and self._stream.isatty()) else None

    def write(self, row: Row) -> None:
        """Shows a row."""
        if row["kind"] not in FORMATS:  # per-layer statistics are for the report
            return
        line = FORMATS[row["kind"]](row, self._total_steps)
        if self._live is not None and row["kind"] == "train":
            self._live.update(row)
        elif self._live is not None:
            self._live.print(line)
        else:
            print(line, file=self._stream, flush=True)

    def close(self) -> None:
        """Ends the live line."""
        if self._live is not None:
            self._live.stop()


class LiveLine:
    """A progress bar with the newest figures behind it; other lines scroll above it."""

    def __init__(self, total_steps: int, stream: Any) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self._console = Console(file=stream, force_terminal=True)
        columns = [
            TextColumn("[bold]{task.completed:>6.0f}[/]/{task.total:.0f}"),
            BarColumn(bar_width=16),
            TextColumn("{task.fields[figures]}"),
        ]
        self._progress = Progress(*columns, console=self._console, refresh_per_second=4)
        self._task = self._progress.add_task("", total=total_steps, figures="")
        self._progress.start()

    def update(self, row: Row) -> None:
        """Moves the bar to a train row."""
        figures = f"loss [bold cyan]{number(row['loss'])}[/]  {figures_of(row)}"
        eta = remaining(row, int(self._progress.tasks[0].total or 0))
        self._progress.update(self._task, completed=row["step"], figures=f"{figures}  eta {eta}", refresh=True)

    def print(self, line: str) -> None:
        """Prints above the bar."""
        self._console.print(line, markup=False, highlight=False)

    def stop(self) -> None:
        """Leaves the last state on the screen."""
        self._progress.stop()


def remaining(row: Row, total_steps: int) -> str:
    """Time to the last step at the row's throughput."""
    tokens, rate = row.get("tokens"), row.get("tokens_per_second")
    if not tokens or not rate or not row["step"]:
        return "-"
    return duration((total_steps - row["step"]) * tokens / row["step"] / rate)


def figures_of(row: Row) -> str:
    """Speed and memory of a train row."""
    parts = [f"{si(row.get('tokens_per_second'))} tok/s"]
    if row.get("mfu") is not None:
        parts.append(f"mfu {percent(row['mfu'])}")
    if row.get("memory_gb") is not None:
        parts.append(f"{row['memory_gb']:.1f} GB")
    if row.get("step_time") and row.get("data_wait", 0.0) > 0.05 * row["step_time"]:
        parts.append(f"data {percent(row['data_wait'] / row['step_time'], 0)}")
    return "  ".join(parts)


def train_line(row: Row, total_steps: int) -> str:
    """One line for a train row."""
    width = len(str(total_steps))
    head = f"step {row['step']:>{width}}/{total_steps}  loss {number(row['loss'])}  lr {number(row.get('lr'), '.2e')}"
    line = f"{head}  norm {number(row.get('grad_norm'), '.2f')}  {figures_of(row)}  eta {remaining(row, total_steps)}"
    return clip(line + ("  SKIPPED" if row.get("skipped") else ""))


def eval_line(row: Row, total_steps: int) -> str:
    """One line for an evaluation."""
    bits = f"  bits/byte {row['bits_per_byte']:.4f}" if row.get("bits_per_byte") is not None else ""
    return clip(
        f"  eval at step {row['step']}: loss {number(row['loss'])}  ppl {number(row.get('perplexity'), '.2f')}{bits}  {row['name']}"
    )


def event_line(row: Row, total_steps: int) -> str:
    """One line for an event, with its details."""
    details = "  ".join(f"{key} {value}" for key, value in row.items() if key not in ("kind", "step", "time", "event"))
    return clip(f"  {row['event']} at step {row['step']}  {details}".rstrip())


def sample_line(row: Row, total_steps: int) -> str:
    """Prompt and continuation on one line."""
    return clip(f"  sample at step {row['step']}: {row['prompt']!r} -> {row['text']!r}")


def clip(line: str) -> str:
    """At most 100 columns: a log stays readable in half a screen."""
    return line if len(line) <= COLUMNS else line[: COLUMNS - 1] + "…"


FORMATS: dict[str, Callable[[Row, int], str]] = {"train": train_line, "eval": eval_line, "event": event_line, "sample": sample_line}
