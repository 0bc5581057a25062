"""Where answers go: stdout, as text of the terminal's width or as one JSON document."""

from __future__ import annotations

import json
import sys
from typing import Any


def console() -> Any:
    """The terminal; 80 columns when stdout is none."""
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else 80)


def print_text(what: Any) -> None:
    """On a terminal in colour and as wide as it is, else as plain text of 80 columns."""
    from vllm_trace import render

    if sys.stdout.isatty():
        console().print(what)
    else:
        sys.stdout.write(render.plain(what))


def print_json(document: Any) -> None:
    """One document, and nothing else."""
    json.dump(document, sys.stdout, indent=1, default=str)
    print()
