"""The plan as tables in the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mamba_pretrain.monitor.text import duration, gigabytes, percent, si
from mamba_pretrain.planning.plan import Candidate, Machine, Plan

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def show_plan(plan: Plan, console: Console) -> None:
    """Prints everything, warnings last where they are read."""
    _heading(plan, console)
    _section(console, "Parameters", _parameters(plan))
    _section(console, _memory_title(plan), _memory(plan))
    if plan.candidates:
        title = "GB of GPU memory needed, by engine and micro-batch (+: with activation checkpointing of blocks)"
        _section(console, title, _engines(plan))
    if plan.communication:
        _section(console, "Sent by each GPU per step", _communication(plan))
    if len(plan.scaling) > 1:
        _section(console, "Scaling at this global batch, on paper", _scaling(plan), f"Model: {plan.network}.")
    for warning in plan.warnings:
        console.print(f"[yellow]![/] {warning}", highlight=False, soft_wrap=True)


def show_found(found: list[Candidate], machine: Machine, console: Console) -> None:
    """Prints the best ways to run, and the overrides for the first."""
    if not found:
        console.print(f"[red]nothing fits {machine.gpus} x {machine.device}[/]: use more GPUs, a shorter sequence or a smaller model")
        return
    table = _table("engine", "micro-batch", "checkpointing", "needs", "step")
    for c in found[:8]:
        step = "-" if c.step_seconds is None else f"{c.step_seconds:.3f} s"
        table.add_row(c.strategy, str(c.micro_batch), c.recompute, gigabytes(c.needed), step)
    _section(console, f"What fits {machine.gpus} x {machine.device}, fastest first", table)
    best = found[0]
    keys = {"parallel.strategy": best.strategy, "train.micro_batch_size": best.micro_batch}
    keys["parallel.activation_checkpointing"] = best.recompute
    console.print(
        "train with: " + " ".join(f"{key}={value}" for key, value in keys.items()),
        highlight=False,
        soft_wrap=True,
    )


def _heading(plan: Plan, console: Console) -> None:
    training, six_n = (plan.flops_per_token[key] / 1e9 for key in ("training", "six_n"))
    split = f"{plan.gpus} GPUs x micro-batch {plan.micro_batch} x {plan.accumulation} x length {plan.sequence_length:,}"
    console.print(f"[bold]{plan.name}[/] on {plan.gpus} x {plan.device}, {plan.strategy}", highlight=False)
    lines = [
        f"  {plan.parameters:,} parameters; training costs {training:.3f} GFLOPs a token (6N: {six_n:.3f})",
        f"  {si(plan.tokens, 2)} tokens = {plan.steps:,} steps of {si(plan.batch_tokens, 2)} tokens: {split}",
    ]
    if plan.time:
        t = plan.time
        lines.append(
            f"  {t['step_seconds']:.3f} s a step, {si(t['tokens_per_second'])} tokens/s (MFU {percent(t['mfu'])}): "
            f"{duration(t['seconds'])}, {t['gpu_hours']:,.0f} GPU-hours"
        )
        lines.append(f"  [dim]by {t['source']}[/]")
    c = plan.checkpoint
    disk = f"up to {gigabytes(c['on_disk'])} on disk while one is written"
    lines.append(f"  checkpoint {gigabytes(c['bytes'])}; {disk}; export {gigabytes(c['export'])}")
    console.print("\n".join(lines), highlight=False, soft_wrap=True)


def _parameters(plan: Plan) -> Table:
    table = _table("kind", "count", "share")
    for kind, count in plan.parameters_by_kind.items():
        table.add_row(kind, f"{count:,}", percent(count / plan.parameters))
    return table


def _memory_title(plan: Plan) -> str:
    m = plan.memory
    verdict = "" if m["capacity"] is None else f" of {gigabytes(m['capacity'])}: [{'green]fits' if m['fits'] else 'red]does not fit'}[/]"
    return f"Memory of a GPU at its peak ({m['moment']}); needs {gigabytes(m['needed'])}{verdict}"


def _memory(plan: Plan) -> Table:
    m = plan.memory
    table = _table("part", "size", "share")
    for part, size in sorted(m["parts"].items(), key=lambda item: -item[1]):
        table.add_row(part, gigabytes(size, 2), percent(size / m["peak"]))
        if part == "activations":
            for mixer, saved in m["activations_by_mixer"].items():
                table.add_row(f"  of {mixer} blocks, in all", gigabytes(saved, 2), "")
    table.add_row("peak", gigabytes(m["peak"], 2), "", style="bold")
    return table


def _engines(plan: Plan) -> Table:
    sizes = sorted({c.micro_batch for c in plan.candidates})
    table = _table("engine", *map(str, sizes))
    by_key = {(c.strategy, c.recompute, c.micro_batch): c for c in plan.candidates}
    for strategy in dict.fromkeys(c.strategy for c in plan.candidates):
        for recompute in ("none", "block"):  # the two ends; --find looks between them
            row = [by_key.get((strategy, recompute, size)) for size in sizes]
            cells = ["" if c is None else f"[{'green' if c.fits else 'red'}]{c.needed / 1e9:.1f}[/]" for c in row]
            table.add_row(strategy + (" +" if recompute == "block" else ""), *cells)
    return table


def _communication(plan: Plan) -> Table:
    table = _table("what", "bytes", "collectives")
    for flow in plan.communication:
        table.add_row(flow["what"], gigabytes(flow["bytes"], 2), str(flow["collectives"]))
    return table


def _scaling(plan: Plan) -> Table:
    table = _table("GPUs", "step", "efficiency")
    for point in plan.scaling:
        table.add_row(f"{point['gpus']:,}", f"{point['step_seconds']:.3g} s", f"{point['efficiency']:.0%}")
    return table


def _table(*columns: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    return table


def _section(console: Console, title: str, table: Table, note: str = "") -> None:
    """A titled table; rich's own titles wrap at the table's width."""
    console.print(f"\n[bold]{title}[/]", highlight=False, soft_wrap=True)
    console.print(table)
    if note:
        console.print(f"[dim]{note}[/]", highlight=False, soft_wrap=True)
