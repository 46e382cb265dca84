"""One self-contained HTML page about one or several runs: no network, no server, light and dark, wide screen and phone."""

from __future__ import annotations

import datetime
import html
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson

from data_tools.errors import UserError
from mamba_pretrain import __version__
from mamba_pretrain.monitor import run_folder
from mamba_pretrain.monitor.metrics import History, Row, read_history
from mamba_pretrain.monitor.text import duration, number, percent, si

TEMPLATES = Path(__file__).parent / "templates"
MAX_POINTS = 1500  # per curve; longer ones are averaged over equal stretches of steps
TRAIN_COLUMNS = ("loss", "lr", "grad_norm", "tokens_per_second", "mfu", "mfu_6n", "memory_gb")
EVAL_COLUMNS = ("loss", "perplexity", "bits_per_byte")
PEAKS = ("grad_norm",)  # averaging would hide what one looks for here
RESTARTS = ("resume", "rollback")
LAYER_CHARTS = (
    {"key": "activation_rms", "title": "Activations", "hint": "RMS of the mixer's output, by layer", "log": True},
    {"key": "gradient_rms", "title": "Gradients by layer", "hint": "RMS at the mixer's output", "log": True},
    {"key": "dt_mean", "title": "Step size dt", "hint": "mean of softplus(dt + bias), by layer", "log": True},
    {"key": "A_mean", "title": "Decay rate -A", "hint": "mean over channels and states, by layer", "log": True},
    {"key": "B_norm", "title": "Norm of B", "hint": "mean over tokens, by layer", "log": False},
    {"key": "C_norm", "title": "Norm of C", "hint": "mean over tokens, by layer", "log": False},
)


def write_report(run_dirs: Sequence[str | Path], output: str | Path | None = None, figures: bool = True) -> Path:
    """Writes the page, by default to ``report.html`` in the first run folder, and the same charts as PNGs to ``figures/`` beside it.

    Raises UserError for a folder that is no run, or a run without any train row.
    """
    if not run_dirs:
        raise UserError("no run given; pass at least one run folder, for example runs/quickstart")
    histories = {Path(folder): read_history(folder) for folder in run_dirs}
    for folder, history in histories.items():
        if not history.train:
            raise UserError(f"{folder} has no train rows yet; wait for its first monitor.log_every steps")
    path = Path(output) if output is not None else Path(run_dirs[0]) / "report.html"
    runs = [describe_run(folder, history) for folder, history in histories.items()]
    _distinct_names(runs)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(render(runs), encoding="utf-8")
    temporary.replace(path)
    if figures:
        from mamba_pretrain.monitor.figures import write_figures

        write_figures(runs, path.parent / "figures")
    return path


def render(runs: list[dict[str, Any]]) -> str:
    """The page's HTML with the runs' data embedded."""
    now = datetime.datetime.now(datetime.timezone.utc)
    layer_charts = [chart for chart in LAYER_CHARTS if any(chart["key"] in run["layers"] for run in runs)]
    footer = f"Written by mamba-pretrain {__version__} on {now:%Y-%m-%d %H:%M} UTC from metrics.jsonl. GB = 1e9 bytes."
    data = orjson.dumps({"runs": runs, "layer_charts": layer_charts, "footer": footer}, option=orjson.OPT_SERIALIZE_NUMPY).decode()
    title = runs[0]["name"] if len(runs) == 1 else f"{len(runs)} runs compared"
    parts = {
        "TITLE": html.escape(f"{title} · training report"),
        "STYLE": (TEMPLATES / "report.css").read_text(),
        # Inside a script element only "</" and "<!--" could end the data early.
        "DATA": data.replace("<", "\\u003c"),
        "SCRIPT": (TEMPLATES / "charts.js").read_text() + (TEMPLATES / "report.js").read_text(),
    }
    pieces = (TEMPLATES / "report.html").read_text().split("@@")
    return "".join(parts[piece] if i % 2 else piece for i, piece in enumerate(pieces))


def describe_run(folder: Path, history: History) -> dict[str, Any]:
    """Everything the page shows of a run."""
    tree, text = run_folder.read_config(folder)
    clock = TrainingClock(history.train)
    status = run_folder.status_of(folder, history)
    tokens = int(history.train[-1].get("tokens") or 0)
    return {
        "name": str(tree.get("name") or folder.resolve().name),
        "folder": str(folder),
        "status": status.word,
        "status_detail": status.detail,
        "train": train_table(history.train, clock),
        "evals": eval_tables(history.evals, clock),
        "layers": layer_tables(history.layers, clock),
        "restarts": [mark for event in history.events if (mark := _restart_mark(event, history.train, clock))],
        "events": [_event_row(event) for event in history.events],
        "samples": [{key: row.get(key) for key in ("step", "prompt", "text")} for row in history.samples],
        "checkpoints": run_folder.checkpoints(folder),
        "blend": run_folder.data_blend(tree, tokens),
        "config": run_folder.flatten_config(tree) if tree else None,
        "config_text": text,
        "tiles": tiles(history, clock, tree),
    }


class TrainingClock:
    """Hours of training at a step: time between rows, without the pauses between a stop and the next resume."""

    def __init__(self, train: list[Row]) -> None:
        self._steps: list[int] = []
        self._hours: list[float] = []
        hours, previous = 0.0, None
        for row in train:
            same_start = previous is not None and previous.get("restart") == row.get("restart")
            seconds = row["time"] - previous["time"] if previous is not None and same_start else row.get("step_time") or 0.0
            hours += max(0.0, seconds) / 3600
            self._steps.append(row["step"])
            self._hours.append(hours)
            previous = row

    @property
    def total_seconds(self) -> float:
        """Seconds up to the last row."""
        return 3600 * self._hours[-1] if self._hours else 0.0

    def hours(self, step: int) -> float:
        """Hours at a step, interpolated between rows."""
        import numpy as np

        return float(np.interp(step, self._steps, self._hours)) if self._steps else 0.0


def train_table(rows: list[Row], clock: TrainingClock) -> dict[str, list[float | None]]:
    """Columns for the charts, at most MAX_POINTS long."""
    groups = [rows[i : i + size] for size in [math.ceil(len(rows) / MAX_POINTS)] for i in range(0, len(rows), size)]
    table: dict[str, list[float | None]] = {
        "step": [group[-1]["step"] for group in groups],
        "tokens": [group[-1].get("tokens") for group in groups],
        "hours": [clock.hours(group[-1]["step"]) for group in groups],
        "data_share": [_mean([_data_share(row) for row in group]) for group in groups],
    }
    for key in TRAIN_COLUMNS:
        pick = _highest if key in PEAKS else _mean
        table[key] = [pick([row.get(key) for row in group]) for group in groups]
    return table


def eval_tables(rows: list[Row], clock: TrainingClock) -> list[dict[str, Any]]:
    """One table per validation dataset."""
    tables = []
    for name in dict.fromkeys(row["name"] for row in rows):
        mine = [row for row in rows if row["name"] == name]
        table: dict[str, Any] = {"name": f"validation {name}", "step": [row["step"] for row in mine]}
        table |= {"tokens": [row.get("tokens") for row in mine], "hours": [clock.hours(row["step"]) for row in mine]}
        table |= {key: [row.get(key) for row in mine] for key in EVAL_COLUMNS}
        tables.append(table)
    return tables


def layer_tables(rows: list[Row], clock: TrainingClock) -> dict[str, Any]:
    """Per statistic, curves of up to five layers from the first to the last."""
    if not rows:
        return {}
    tables = {}
    for key in rows[-1]["stats"]:
        count = len(rows[-1]["stats"][key])
        chosen = sorted({round(i * (count - 1) / 4) for i in range(5)}) if count else []
        mine = [row for row in rows if len(row["stats"].get(key, ())) == count]
        tables[key] = {
            "layers": chosen,
            "step": [row["step"] for row in mine],
            "tokens": [row.get("tokens") for row in mine],
            "hours": [clock.hours(row["step"]) for row in mine],
            "values": [[row["stats"][key][layer] for row in mine] for layer in chosen],
        }
    return tables


def tiles(history: History, clock: TrainingClock, config: dict[str, Any]) -> list[dict[str, str]]:
    """The figures one asks for first."""
    last = history.train[-1]
    recent = [row["tokens_per_second"] for row in history.train[-50:] if row.get("tokens_per_second")]
    found = [_tile("Training loss", number(_mean([row.get("loss") for row in history.train[-20:]])), under="last 20 rows")]
    for name in dict.fromkeys(row["name"] for row in history.evals):
        mine = [row for row in history.evals if row["name"] == name]
        best = min((row["loss"] for row in mine if row.get("loss") is not None), default=None)
        found.append(_tile(f"Validation {name}", number(mine[-1]["loss"]), under=f"best {number(best)}"))
        found.append(_tile(f"Perplexity {name}", number(mine[-1].get("perplexity"), ".2f"), under=_bits(mine[-1])))
    found.append(_tile("Tokens", si(last.get("tokens"), 2), under=f"{last['step']:,} steps"))
    speed = sorted(recent)[len(recent) // 2] if recent else None
    found.append(_tile("Throughput", si(speed), "tok/s", under="last 50 rows"))
    if last.get("mfu") is not None:
        found.append(_tile("MFU", percent(last["mfu"]), under=f"by 6N {percent(last.get('mfu_6n'))}"))
    memory = [row["memory_gb"] for row in history.train if row.get("memory_gb") is not None]
    if memory:
        found.append(_tile("Peak memory", f"{max(memory):.1f}", "GB", under="rank 0"))
    restarts = int(last.get("restart") or 0)
    found.append(_tile("Training time", duration(clock.total_seconds), under=f"{restarts} restart{'' if restarts == 1 else 's'}"))
    return found


def _bits(row: Row) -> str:
    return f"{row['bits_per_byte']:.4f} bits per byte" if row.get("bits_per_byte") is not None else ""


def _tile(name: str, value: str, unit: str = "", under: str = "") -> dict[str, str]:
    return {"name": name, "value": value, "unit": unit, "under": under}


def _restart_mark(event: Row, train: list[Row], clock: TrainingClock) -> dict[str, Any] | None:
    if event["event"] not in RESTARTS:
        return None
    before = [row for row in train if row["step"] <= event["step"]]
    tokens = (before[-1] if before else train[0]).get("tokens")
    return {"step": event["step"], "tokens": tokens, "hours": clock.hours(event["step"]), "label": event["event"]}


def _event_row(event: Row) -> dict[str, Any]:
    when = datetime.datetime.fromtimestamp(event["time"], datetime.timezone.utc)
    details = "  ".join(f"{key} {value}" for key, value in event.items() if key not in ("kind", "step", "time", "event"))
    return {"step": event["step"], "time": f"{when:%Y-%m-%d %H:%M:%S}", "event": event["event"], "details": details}


def _data_share(row: Row) -> float | None:
    wait, seconds = row.get("data_wait"), row.get("step_time")
    return None if wait is None or not seconds else min(1.0, wait / seconds)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _highest(values: Sequence[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def _distinct_names(runs: list[dict[str, Any]]) -> None:
    """Runs of one name are told apart by their folders."""
    names = [run["name"] for run in runs]
    for run in runs:
        if names.count(run["name"]) > 1:
            run["name"] = f"{run['name']} ({run['folder']})"
