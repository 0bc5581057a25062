"""Puts into the pages what their commands print: ``.venv/bin/python docs/pages.py``.

A ``console`` block with one command and a ``text`` block right after it belong together: the second is what the first
prints. Only commands that read a trace or calculate are treated so; a test compares them.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("quickstart", "concepts", "implementation", "comparison", "results")

PAIR = re.compile(r"```console\n(vllm-trace [^\n]*)\n```\n\n```text\n(.*?)```", re.S)


def printed(command: str) -> str:
    """What a command of this package prints, run in this process at the top of the repository."""
    from vllm_trace import cli

    said = io.StringIO()
    before = Path.cwd()
    os.chdir(ROOT)
    try:
        with contextlib.redirect_stdout(said):
            cli.main(shlex.split(command)[1:])
    finally:
        os.chdir(before)
    return said.getvalue()


def pairs(text: str) -> Iterator[tuple[str, str]]:
    """(command, what the page says it prints)."""
    return (match.groups() for match in PAIR.finditer(text))  # type: ignore[return-value]


def fill(text: str) -> str:
    """The page with every output made anew."""
    return PAIR.sub(
        lambda match: f"```console\n{match[1]}\n```\n\n```text\n{printed(match[1])}```", text
    )


if __name__ == "__main__":
    for name in PAGES[:-1]:  # results.md is made whole by `vllm-trace bench --page`
        page = ROOT / "docs" / f"{name}.md"
        page.write_text(fill(page.read_text(encoding="utf-8")), encoding="utf-8")
