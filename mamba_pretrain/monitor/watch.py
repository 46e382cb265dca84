"""The live view of a run in a terminal: reads the run folder only, so it works over ssh on a run of another process or node."""

from __future__ import annotations

import shutil
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_tools.errors import UserError
from mamba_pretrain.monitor import diagnose, heartbeat, run_folder
from mamba_pretrain.monitor.console import remaining
from mamba_pretrain.monitor.metrics import FILE_NAME, History, Tail
from mamba_pretrain.monitor.plot import braille_chart, value_range
from mamba_pretrain.monitor.text import duration, gigabytes, number, percent, si, sparkline

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

CHART_HEIGHT = 8
RANKS_SHOWN = 8
LOW_DISK = 5e9
STATUS_COLORS = {"finished": "green", "running": "cyan", "stopped": "yellow", "hung": "red", "interrupted": "red"}


def watch(run_dir: Path, interval: float = 1.0, once: bool = False, console: Console | None = None) -> None:
    """Shows the run until Ctrl-C; prints one frame with ``once`` or when the output is no terminal.

    Raises UserError if the folder does not exist. A folder without metrics yet is waited for; a restart of the run is followed.
    """
    from rich.console import Console
    from rich.live import Live

    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise UserError(f"run folder {run_dir} does not exist; pass the folder named run_dir in the config, for example runs/quickstart")
    console = console or Console()
    tail = Tail(run_dir / FILE_NAME)
    tail.poll()
    if once or not console.is_terminal:
        console.print(frame(run_dir, tail.history, console.width))
        return
    with Live(frame(run_dir, tail.history, console.width), console=console, screen=True, auto_refresh=False) as live:
        try:
            while True:
                tail.poll()
                live.update(frame(run_dir, tail.history, console.width), refresh=True)
                time.sleep(interval)
        except KeyboardInterrupt:
            return


def frame(run_dir: Path, history: History, width: int) -> RenderableType:
    """One picture of the run, at most ``width`` columns wide."""
    from rich.console import Group
    from rich.padding import Padding
    from rich.text import Text

    width = min(width, 140)
    config, _ = run_folder.read_config(run_dir)
    total = total_steps(config, history)
    parts: list[RenderableType] = [_heading(run_dir, history, config, total)]
    if history.last is None:
        parts.append(Text("\n  Waiting for the first train row in metrics.jsonl …", style="dim"))
    else:
        parts += [_progress(history, total, width), _loss_chart(history, width), _speed(history, width)]
        if history.evals:
            parts.append(_evaluations(history))
    if ranks := _ranks(run_dir):
        parts.append(ranks)
    if saved := run_folder.checkpoints(run_dir):
        parts.append(_checkpoints(saved))
    for warning in warnings(run_dir, history):
        parts.append(Text(f"! {warning}", style="yellow"))
    return Padding(Group(*parts), (0, 1))


def total_steps(config: dict[str, Any], history: History) -> int | None:
    """Steps of the whole run, from its config and, for a length in tokens, from the tokens per step seen so far."""
    train = config.get("train") or {}
    if train.get("steps"):
        return int(train["steps"])
    last = history.last
    if train.get("tokens") and last and last.get("tokens"):
        return max(last["step"], round(train["tokens"] * last["step"] / last["tokens"]))
    return None


def warnings(run_dir: Path, history: History) -> list[str]:
    """What a person should look at, most urgent first."""
    found = []
    last, recent = history.last, history.train[-50:]
    if last is not None and last.get("loss") is None:
        found.append(f"the loss at step {last['step']} is not finite; see train.spikes and docs/troubleshooting.md")
    found += [f"rank {s.rank} on {s.node} computes slower than the others" for s in diagnose.stragglers(diagnose.rank_speeds(run_dir))]
    found += [line.strip() for line in diagnose.liveness_report(run_dir) if line.startswith("silent")]
    waits = [row["data_wait"] / row["step_time"] for row in recent if row.get("step_time") and row.get("data_wait") is not None]
    if waits and statistics.median(waits) > 0.1:
        found.append(f"{percent(statistics.median(waits), 0)} of each step waits for data; use faster storage or fewer, larger shards")
    speeds = [row["tokens_per_second"] for row in history.train[-500:] if row.get("tokens_per_second")]
    if len(speeds) >= 40 and statistics.median(speeds[-5:]) < 0.8 * statistics.median(speeds):
        found.append("throughput is more than 20% under its median; see `mamba-pretrain diagnose`")
    spikes = [event for event in history.events if event["event"] in ("spike", "hang", "rollback")]
    if spikes:
        found.append(f"{len(spikes)} spike or hang events, the last at step {spikes[-1]['step']}")
    free = shutil.disk_usage(run_dir).free
    if free < LOW_DISK:
        found.append(f"only {gigabytes(free)} free where the run folder lies; the next checkpoint may not fit")
    return found


def _heading(run_dir: Path, history: History, config: dict[str, Any], total: int | None) -> RenderableType:
    from rich.text import Text

    status = run_folder.status_of(run_dir, history)
    restarts = int(history.last.get("restart") or 0) if history.last else 0
    line = Text.assemble(
        (str(config.get("name") or run_dir.resolve().name), "bold"), "  ", (status.word, f"bold {STATUS_COLORS[status.word]}"), "  "
    )
    if restarts:
        line.append(f"{restarts} restart{'s' if restarts > 1 else ''}  ", style="yellow")
    line.append(f"{status.detail}  " if status.detail else "", style="dim")
    line.append(str(run_dir), style="dim")
    return line


def _progress(history: History, total: int | None, width: int) -> RenderableType:
    from rich.progress_bar import ProgressBar
    from rich.table import Table

    last = history.last or {}
    row = Table.grid(padding=(0, 2))
    of = f"/{total:,}" if total else ""
    bar = ProgressBar(total=total or 1, completed=last["step"] if total else 0, width=max(10, min(44, width - 64)))
    share = percent(last["step"] / total) if total else ""
    eta = f"eta {remaining(last, total)}" if total else ""
    row.add_row(f"step [bold]{last['step']:,}[/]{of}", bar, share, f"{si(last.get('tokens'), 2)} tokens", f"[bold]{eta}[/]")
    return row


def _loss_chart(history: History, width: int) -> RenderableType:
    from rich.panel import Panel
    from rich.text import Text

    losses = history.column("loss")
    # The first steps fall so steeply that they would flatten everything behind them.
    shown = losses[len(losses) // 20 :] if len(losses) > 200 else losses
    finite = [v for v in shown if v is not None]
    lines = braille_chart(shown, width - 14, CHART_HEIGHT)
    low, high = value_range(finite) if finite else (None, None)
    labels = {0: number(high, "7.3f"), CHART_HEIGHT - 1: number(low, "7.3f")}
    chart = Text("\n").join(Text.assemble((f"{labels.get(i, ''):>7} ", "dim"), (line, "cyan")) for i, line in enumerate(lines))
    last = history.last or {}
    title = f"loss [bold]{number(last.get('loss'))}[/]"
    return Panel(chart, title=title, title_align="left", border_style="dim", width=width - 2)


def _speed(history: History, width: int) -> Table:
    from rich.table import Table

    last = history.last or {}
    wait = last["data_wait"] / last["step_time"] if last.get("step_time") and last.get("data_wait") is not None else None
    grid = Table.grid(padding=(0, 2))
    chart = max(8, min(36, width // 2 - 26))
    cells = [
        ("tokens/s", si(last.get("tokens_per_second")), sparkline(history.column("tokens_per_second")[-200:], chart)),
        ("grad norm", number(last.get("grad_norm"), ".3f"), sparkline(history.column("grad_norm")[-200:], chart)),
        ("MFU", percent(last.get("mfu")), f"{percent(last.get('mfu_6n'))} by 6N" if last.get("mfu_6n") is not None else ""),
        ("lr", number(last.get("lr"), ".2e"), sparkline(history.column("lr"), chart)),
        ("memory", f"{number(last.get('memory_gb'), '.1f')} GB", ""),
        ("data wait", percent(wait), ""),
    ]
    for left, right in zip(cells[::2], cells[1::2], strict=True):
        grid.add_row(
            *(text for name, value, line in (left, right) for text in (f"[dim]{name}[/]", f"[bold]{value}[/]", f"[cyan]{line}[/]"))
        )
    return grid


def _evaluations(history: History) -> Table:
    from rich.table import Table

    grid = Table.grid(padding=(0, 2))
    for name in dict.fromkeys(row["name"] for row in history.evals):
        mine = [row for row in history.evals if row["name"] == name]
        last = mine[-1]
        bits = f"{last['bits_per_byte']:.4f} bits/byte" if last.get("bits_per_byte") is not None else ""
        figures = f"[bold]{number(last['loss'])}[/]", f"ppl {number(last.get('perplexity'), '.2f')}", bits
        grid.add_row(
            "[dim]validation[/]", name, *figures, f"[cyan]{sparkline([row['loss'] for row in mine], 20)}[/]", f"[dim]step {last['step']}[/]"
        )
    return grid


def _ranks(run_dir: Path) -> Table | None:
    from rich.table import Table

    beats = heartbeat.read_all(run_dir)
    if not beats:
        return None
    grid = Table.grid(padding=(0, 2))
    # With many ranks those that matter are shown: the ones furthest behind.
    shown = beats if len(beats) <= RANKS_SHOWN else sorted(beats, key=lambda beat: (beat.step, -beat.age))[:RANKS_SHOWN]
    for beat in shown:
        color = {"running": "", "hung": "red", "stopped": "dim"}.get(beat.state, "")
        age = f"{duration(max(0.0, time.time() - beat.time))} ago"
        grid.add_row("[dim]rank[/]", str(beat.rank), beat.node, f"step {beat.step}", beat.phase, beat.state, f"[dim]{age}[/]", style=color)
    if len(beats) > len(shown):
        grid.add_row("[dim]ranks[/]", str(len(beats)), f"steps {min(b.step for b in beats)}-{max(b.step for b in beats)}")
    return grid


def _checkpoints(saved: list[dict[str, Any]]) -> RenderableType:
    from rich.text import Text

    newest = next((item for item in reversed(saved) if item["latest"]), saved[-1])
    total = sum(item["bytes"] for item in saved)
    return Text.assemble(("checkpoints  ", "dim"), f"{len(saved)}, latest {newest['name']}  ", (f"{gigabytes(total, 2)} in all", "dim"))
