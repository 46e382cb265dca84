"""``mamba-data``: from text to token shards.

A spawned worker imports the script that started it, and with it this file: so everything else is imported when a command line is run.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from data_tools.errors import UserError


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: wrong input is one sentence on stderr and exit code 2."""
    from data_tools.cli.app import app

    try:
        app(args=list(arguments) if arguments is not None else None, prog_name="mamba-data")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
