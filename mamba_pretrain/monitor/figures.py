"""The report's charts as PNG files, for papers, slides and terminals that show pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

COLORS = ("#2f6df6", "#e8710a", "#12935a", "#a142d6", "#d63a5e", "#0d92a8", "#8a6d1d", "#64748b")
# file name: (column, title, axis label, log scale)
FIGURES = {
    "loss": ("loss", "Loss", "nats per token", False),
    "learning_rate": ("lr", "Learning rate", "", False),
    "grad_norm": ("grad_norm", "Gradient norm before clipping", "", True),
    "throughput": ("tokens_per_second", "Throughput", "tokens per second", False),
    "mfu": ("mfu", "Model FLOPs utilisation", "share of peak", False),
    "memory": ("memory_gb", "Peak memory, rank 0", "GB", False),
}


def write_figures(runs: list[dict[str, Any]], folder: Path) -> list[Path]:
    """One PNG per chart that has data (``runs`` as made by ``report.describe_run``); returns their paths."""
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, (column, title, label, log) in FIGURES.items():
        if any(value is not None for run in runs for value in run["train"][column]):
            written.append(_draw(runs, folder / f"{name}.png", column, title, label, log))
    return written


def _draw(runs: list[dict[str, Any]], path: Path, column: str, title: str, label: str, log: bool) -> Path:
    from matplotlib import pyplot
    from matplotlib.ticker import EngFormatter

    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=150, layout="constrained")
    for i, run in enumerate(runs):
        color = COLORS[i % len(COLORS)]
        axes.plot(run["train"]["tokens"], _numbers(run["train"][column]), color=color, linewidth=1.1, label=run["name"])
        if column == "loss":
            for table in run["evals"]:
                name = f"{run['name']}: {table['name']}"
                axes.plot(table["tokens"], _numbers(table["loss"]), "o--", color=color, markersize=4, markerfacecolor="white", label=name)
        for mark in run["restarts"]:
            axes.axvline(mark["tokens"], color="#a15c00", linewidth=0.8, linestyle=(0, (3, 4)))
    axes.set_title(title, loc="left", fontweight="bold")
    axes.set_xlabel("tokens")
    axes.set_ylabel(label)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if log:
        axes.set_yscale("log")
    if column == "tokens_per_second":
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(color="#e3e7ec", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    if len(axes.lines) > 1:
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path)
    pyplot.close(figure)
    return path


def _numbers(values: list[float | None]) -> list[float]:
    return [float("nan") if value is None else value for value in values]
