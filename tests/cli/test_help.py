"""Help is quick, complete and loads nothing heavy."""

from __future__ import annotations

import subprocess
import sys

import pytest

from mamba_pretrain import __version__
from mamba_pretrain.cli import COMMANDS


def test_help_lists_every_command_and_imports_no_torch():
    code = "import sys; from mamba_pretrain.cli import app; app(args=['--help'], standalone_mode=False); print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "False"
    for command in COMMANDS:
        assert command in result.stdout


def test_version_is_printed_without_torch():
    code = "import sys; from mamba_pretrain.cli import app; app(args=['--version'], standalone_mode=False); print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines() == [f"mamba-pretrain {__version__}", "False"]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_shows_an_example(cli, command):
    result = cli(command, "--help")
    assert result.returncode == 0
    assert f"mamba-pretrain {command}" in " ".join(result.stdout.replace("│", " ").split())


def test_an_unknown_command_is_refused(cli):
    result = cli("trian")
    assert result.returncode == 2
    assert "train" in result.stderr
