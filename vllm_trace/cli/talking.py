"""How a verb talks with whoever sits at the terminal, and what a pipe gets instead."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from vllm_trace.cli.printing import console, print_line


def show(lines: Sequence[str]) -> None:
    """Headings in bold on a terminal; plain text without ``# `` else."""
    if not sys.stdout.isatty():
        print_line("\n".join(line.removeprefix("# ") for line in lines))
        return
    from rich.text import Text

    terminal = console()
    for line in lines:
        heading = line.startswith("# ")
        terminal.print(Text(line.removeprefix("# "), style="bold" if heading else ""))


def talks() -> bool:
    """Somebody sits there: answers can be typed."""
    return sys.stdin.isatty() and sys.stdout.isatty()


def typed(prompt: str) -> str:
    """A line that is typed after a prompt; ``q`` when the input ends."""
    try:
        return input(prompt).strip()
    except EOFError:
        print()
        return "q"
