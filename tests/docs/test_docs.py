"""The documentation is true: links lead somewhere, messages exist in the code, commands and keys exist, and the newcomer's path works."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
DOCS = REPOSITORY / "docs"
PAGES = [*sorted(DOCS.glob("*.md")), REPOSITORY / "README.md"]
# Messages in troubleshooting.md that other software prints.
FOREIGN = {
    "undefined symbol",
    "CUDA out of memory",
    "an illegal memory access was encountered",
    "Watchdog caught collective operation timeout",
    "Address already in use",
    "Bus error",
}


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if "://" in target or target.startswith("mailto:"):
            continue
        name, _, anchor = target.partition("#")
        linked = (page.parent / name).resolve() if name else page
        assert linked.exists(), f"{page.name} links to {target}"
        if anchor:
            assert anchor in anchors(linked), f"{page.name} links to {target}"


def source_text() -> str:
    """Every string literal of the code, with the holes of f-strings as blanks."""
    pieces: list[str] = []
    for folder in ("mamba_pretrain", "data_tools", "launch"):
        for path in (REPOSITORY / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    pieces.append("".join(part.value if isinstance(part, ast.Constant) else " " for part in node.values))  # type: ignore[misc]
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    pieces.append(node.value)
    return "\n".join(" ".join(piece.split()) for piece in pieces)


def test_messages_in_troubleshooting_exist() -> None:
    text = source_text()
    headings = re.findall(r"^### (.+)$", (DOCS / "troubleshooting.md").read_text(), flags=re.MULTILINE)
    assert len(headings) > 20
    # A heading may quote a message across a hole: each part between holes must be there.
    for heading in headings:
        assert heading in FOREIGN or heading in text, f"no message of the code contains {heading!r}"


def command_lines(page: Path) -> list[str]:
    """Lines of bash blocks, continuations joined."""
    blocks = re.findall(r"```(?:bash|console)\n(.*?)```", page.read_text(), flags=re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line.strip().removeprefix("$ ").split("  #")[0] for line in lines]


@pytest.fixture(scope="module")
def reference() -> Any:
    spec = importlib.util.spec_from_file_location("generate_commands", DOCS / "generate_commands.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_options_and_keys_in_the_docs_exist(page: Path, reference: Any) -> None:
    from data_tools.cli.app import app as data_app
    from mamba_pretrain.cli import app as main_app
    from mamba_pretrain.config import RunConfig

    known = {"mamba-data": reference.commands(data_app), "mamba-pretrain": reference.commands(main_app)}
    for line in command_lines(page):
        words = line.split()
        if not words or words[0] not in known or len(words) < 2 or words[1].startswith("-"):
            continue
        assert words[1] in known[words[0]], f"{page.name}: {line}"
        options = {flag for parameter in known[words[0]][words[1]].params for flag in [*parameter.opts, *parameter.secondary_opts]}
        for word in words[2 : words.index("--") if "--" in words else None]:  # what follows belongs to another command
            if re.match(r"--?[a-z]", word):
                assert word.split("=")[0] in options | {"--help"}, f"{page.name}: {line}"
            elif re.match(r"[a-z_]+\.[\w.]+=", word):
                assert key_exists(RunConfig, word.split("=")[0].split(".")), f"{page.name}: {word}"


def key_exists(model: Any, path: list[str]) -> bool:
    """Whether a dotted key leads through the configs' fields (a shortcut such as data.path counts, and so does a list index)."""
    from mamba_pretrain.config import _submodel

    for i, part in enumerate(path):
        if part.isdigit():
            continue
        if model is None:
            return False
        if part not in model.model_fields:
            return path[: i + 1] == ["data", "path"]
        model = _submodel(model.model_fields[part].annotation)
    return True


@pytest.mark.parametrize(
    "page", [DOCS / "coming-from.md", DOCS / "troubleshooting.md", DOCS / "index.md", DOCS / "plan.md"], ids=lambda p: p.name
)
def test_config_keys_named_in_the_text_exist(page: Path) -> None:
    from mamba_pretrain.config import RunConfig

    rooms = set(RunConfig.model_fields)
    for key in re.findall(r"`([a-z_]+(?:\.[a-z_0-9]+)+)", page.read_text()):
        if key.split(".")[0] in rooms:
            assert key_exists(RunConfig, key.split(".")), f"{page.name}: {key}"


def test_every_command_has_its_section(reference: Any) -> None:
    headings = re.findall(r"^## (.+)$", (DOCS / "commands.md").read_text(), flags=re.MULTILINE)
    expected = re.findall(r"^## (.+)$", reference.page(), flags=re.MULTILINE)
    assert headings == expected, "run python docs/generate_commands.py"


def test_site_builds(tmp_path: Path) -> None:
    if importlib.util.find_spec("mkdocs") is None:
        pytest.skip("mkdocs is not installed (pip install -e '.[docs]'); `make docs` builds the site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "site" / "index.html").is_file()


@pytest.mark.slow
def test_newcomers_path_works(tmp_path: Path) -> None:
    """Runs the marked blocks of the guide, command by command, in one shell with one folder."""
    blocks = re.findall(r"<!-- run -->\n```bash\n(.*?)```", (DOCS / "index.md").read_text(), flags=re.DOTALL)
    assert len(blocks) == 9
    (tmp_path / "configs").symlink_to(REPOSITORY / "configs")
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "2",
        "CUDA_VISIBLE_DEVICES": "",
    }
    script = "set -euxo pipefail\n" + "\n".join(blocks)
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    run = tmp_path / "work" / "run"
    assert (run / "report.html").stat().st_size > 20_000
    assert (tmp_path / "work" / "exported" / "config.json").is_file()
    from mamba_pretrain.monitor.metrics import read_history

    assert [row["step"] for row in read_history(run).train] == list(range(1, 21))
