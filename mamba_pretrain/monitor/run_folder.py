"""What a run folder tells besides its metrics: status, configuration, checkpoints, data blend."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from mamba_pretrain.monitor import heartbeat
from mamba_pretrain.monitor.metrics import History

STALE_SECONDS = 120.0


@dataclass(frozen=True)
class Status:
    """``word``: finished, running, stopped (asked to), hung or interrupted (no goodbye); ``detail`` says more."""

    word: str
    detail: str


def status_of(run_dir: Path, history: History, now: float | None = None) -> Status:
    """How the run stands, from its last event and its heartbeats."""
    now = time.time() if now is None else now
    beats = heartbeat.read_all(run_dir)
    if any(beat.state == "hung" for beat in beats):
        hung = next(beat for beat in beats if beat.state == "hung")
        return Status("hung", f"rank {hung.rank} on {hung.node} at step {hung.step}, {hung.phase}")
    last = history.events[-1] if history.events else {}
    if last.get("event") in ("stop", "save") and (reason := _stop_reason(history)):
        return Status("finished", "") if reason == "finished" else Status("stopped", reason)
    alive = [beat for beat in beats if beat.state == "running" and now - beat.time < STALE_SECONDS]
    newest = history.last["time"] if history.last else 0.0
    if alive or now - newest < STALE_SECONDS:
        return Status("running", f"{len(alive)} ranks" if len(alive) > 1 else "")
    return Status("interrupted", "no goodbye; start the same command again to resume")


def _stop_reason(history: History) -> str | None:
    """The reason of a stop that no later start or train row made void (a last save may follow the stop)."""
    for event in reversed(history.events):
        if event["event"] == "stop":
            newer = history.last is not None and history.last["time"] > event["time"]
            return None if newer else str(event.get("reason", "stopped"))
        if event["event"] != "save":
            return None
    return None


def read_config(run_dir: Path) -> tuple[dict[str, Any], str]:
    """The resolved configuration as a tree and as text; both empty when the folder has none."""
    path = run_dir / "config.yaml"
    if not path.is_file():
        return {}, ""
    import yaml

    text = path.read_text()
    tree = yaml.safe_load(text)
    return (tree if isinstance(tree, dict) else {}), text


def flatten_config(tree: Any, prefix: str = "") -> dict[str, str]:
    """``{"optim.lr": "0.001"}``: dotted keys and values as text, to compare runs by."""
    if isinstance(tree, dict) and tree:
        items: Any = tree.items()
    elif isinstance(tree, list) and any(isinstance(item, dict | list) for item in tree):
        items = enumerate(tree)
    else:
        return {prefix: "" if tree is None else str(tree)}
    flat: dict[str, str] = {}
    for key, value in items:
        flat |= flatten_config(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def checkpoints(run_dir: Path) -> list[dict[str, Any]]:
    """Complete checkpoints, oldest first: name, bytes, and whether ``latest`` points at it."""
    folder = run_dir / "checkpoints"
    pointer = folder / "latest"
    latest = pointer.read_text().strip() if pointer.is_file() else ""
    return [
        {
            "name": path.name,
            "bytes": sum(file.stat().st_size for file in path.iterdir() if file.is_file()),
            "latest": path.name == latest,
        }
        for path in sorted(folder.glob("step-*"))
        if (path / "manifest.json").is_file()
    ]


def data_blend(config: dict[str, Any], tokens_seen: int) -> list[dict[str, Any]]:
    """Each source's share of the training tokens, its size if its manifest is at hand, and how many times it was passed over."""
    sources = [source for source in (config.get("data") or {}).get("sources") or [] if isinstance(source, dict)]
    weights = [float(source.get("weight") or 1.0) for source in sources]
    total = sum(weights) or 1.0
    found = []
    for source, weight in zip(sources, weights, strict=True):
        path = str(source.get("path", ""))
        tokens = training_tokens(Path(path))
        share = weight / total
        found.append(
            {
                "name": str(source.get("name") or Path(path).name),
                "path": path,
                "share": share,
                "tokens": tokens,
                "epochs": share * tokens_seen / tokens if tokens else None,
            }
        )
    return found


def training_tokens(dataset: Path) -> int | None:
    """Tokens of a dataset's training split by its manifest; None when there is none at hand."""
    try:
        manifest = orjson.loads((dataset / "manifest.json").read_bytes())
    except (OSError, orjson.JSONDecodeError):
        return None
    shards = manifest.get("splits", {}).get("train", {}).get("shards", [])
    return sum(shard["tokens"] for shard in shards) or None
