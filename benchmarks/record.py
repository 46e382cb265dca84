"""Writes and finds benchmark records: one JSON a run, with what is needed to read the figures later."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import itertools
import json
import platform
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

RESULTS = Path(__file__).parent / "results"
PACKAGES = (
    "torch",
    "triton",
    "mamba-ssm",
    "causal-conv1d",
    "flash-linear-attention",
    "liger-kernel",
    "deepspeed",
    "transformers",
    "tokenizers",
    "sentencepiece",
    "gigatoken",
    "numpy",
)


def device_name() -> str:
    """The accelerator's name, or the processor's."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Installed versions of the packages that figures depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def record(name: str, payload: dict[str, Any], device: str | None = None, folder: Path = RESULTS) -> Path:
    """Writes ``folder/name-DEVICE-DATE.json`` with the payload, the command, versions, device and date; returns its path.

    A name that is taken, by a run beside this one, gets a number: no record overwrites another.
    """
    device = device or device_name()
    now = datetime.datetime.now(datetime.timezone.utc)
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    stem = f"{name}-{slug}-{now:%Y%m%dT%H%M}"
    command = " ".join([Path(sys.executable).name, *sys.argv])
    body = {
        "name": name,
        "command": command,
        "date": now.isoformat(timespec="seconds"),
        "device": device,
        "versions": versions(),
        **payload,
    }
    folder.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        path = folder / f"{stem}{'' if number == 1 else f'-{number}'}.json"
        with contextlib.suppress(FileExistsError), path.open("x") as file:
            file.write(json.dumps(body, indent=1) + "\n")
            return path
    raise AssertionError("unreachable")


class Growing:
    """A record written anew after every part of a run, so that one which is cut off leaves what it measured."""

    def __init__(self, name: str, folder: Path = RESULTS) -> None:
        self.name, self.folder = name, folder
        self.path: Path | None = None

    def save(self, payload: dict[str, Any], device: str | None = None) -> Path:
        """Replaces what was saved before."""
        new = record(self.name, payload, device, self.folder)
        if self.path is not None:
            self.path.unlink()
        self.path = new
        return new


def newest(name: str, device_contains: str = "", folder: Path = RESULTS) -> dict[str, Any]:
    """The newest record of that name (whose device contains the given text); ends the program with a sentence, exit code 1, if there is none."""
    return every(name, device_contains, folder)[-1]


def every(name: str, device_contains: str = "", folder: Path = RESULTS) -> list[dict[str, Any]]:
    """All records of that name, the newest last; like ``newest`` where there is none."""
    records = [json.loads(p.read_text()) for p in folder.glob(f"{name}-*.json")]
    records = [r for r in records if r["name"] == name and device_contains.lower() in r["device"].lower()]
    if not records:
        sys.exit(f"no record of {name} under {folder}; run benchmarks/{name}.py on the machine to be measured")
    return sorted(records, key=lambda r: r["date"])


def require_gpus(parser: argparse.ArgumentParser, count: int = 1) -> None:
    """Ends the program with a sentence, exit code 2, where there are fewer GPUs than a measurement needs."""
    import torch

    if (found := torch.cuda.device_count()) < count:
        there = "no GPU" if found == 0 else f"{found} of the {count} GPUs that this needs"
        parser.error(f"this machine has {there}; --check reads the newest record")


def rows_of(name: str, measure: Callable[[], Iterable[dict[str, Any]]]) -> list[dict[str, Any]]:
    """What ``measure`` finds on this machine's GPU, recorded under that name row by row; without a GPU the rows of the newest record."""
    import torch

    if torch.cuda.is_available():
        growing, rows = Growing(name), []
        for row in measure():
            rows.append(row)
            growing.save({"rows": rows})
        print(growing.path)
        return rows
    found = newest(name)
    print(f"{found['device']}, {found['date']}{', ' + found['note'] if 'note' in found else ''}")
    return list(found["rows"])


def conclude(failed: list[str]) -> NoReturn:
    """Prints what is under its bar and ends the program, with exit code 1 if anything is."""
    for line in failed:
        print(f"UNDER THE BAR {line}")
    sys.exit(bool(failed))
