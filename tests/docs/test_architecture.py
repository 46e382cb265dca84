"""The floors that docs/architecture.md draws are those of the code: no import climbs, not even one for types."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("data_tools", "launch", "mamba_pretrain")


def floors() -> dict[str, int]:
    """Rooms by name, from the table; ``.run`` stands for ``mamba_pretrain.run``."""
    found = {}
    for row in re.findall(r"^\| (\d) \| (.*?) \|", (ROOT / "docs/architecture.md").read_text(), re.MULTILINE):
        for room in re.findall(r"`(.*?)`", row[1]):
            found[f"mamba_pretrain{room}" if room.startswith(".") else room] = int(row[0])
    return found


def room(module: str) -> str | None:
    """The room of a module of ours."""
    first, *rest = module.split(".")
    if first not in PACKAGES:
        return None
    return ".".join([first, *rest[:1]]) if first == "mamba_pretrain" and rest else first


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Lines and modules of all imports, inside functions as well."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            # `from mamba_pretrain import config` names a room, not something in the package.
            names = [f"{node.module}.{alias.name}" for alias in node.names] if node.module in PACKAGES else [node.module]
            yield from ((node.lineno, name) for name in names)
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)


def climbing(path: Path, of_module: str, known: dict[str, int]) -> list[str]:
    """Imports of a file that climb, in words."""
    own = room(of_module)
    above = ((line, module) for line, module in imports(path) if (target := room(module)) in known and known[target] > known[own])
    return [f"{path.relative_to(ROOT)}:{line} imports {module}" for line, module in above]


def sources() -> Iterator[tuple[Path, str]]:
    """Our files and their modules."""
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            yield path, ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_every_room_has_a_floor():
    rooms = {room(module) for _, module in sources()} - {"mamba_pretrain", "mamba_pretrain.__main__"}
    assert rooms == set(floors())


def test_no_import_climbs():
    known = {**floors(), "mamba_pretrain": 9, "mamba_pretrain.__main__": 9}
    found = [line for path, module in sources() for line in climbing(path, module, known)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "line", ["from mamba_pretrain.training.loop import Run", "import mamba_pretrain.cli.train", "from mamba_pretrain import config"]
)
def test_a_climbing_import_is_seen(tmp_path, monkeypatch, line):
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    path = tmp_path / "example.py"
    path.write_text(f"def f():\n    {line}\n")
    known = {f"mamba_pretrain.{name}": floor for floor, name in enumerate(("models", "training", "config", "cli"))}
    assert len(climbing(path, "mamba_pretrain.models.example", known)) == 1
