"""Where answers go: stdout, as text of the terminal's width or as one JSON document; the rest to stderr.

Names in a trace come from whoever sent a request. A terminal obeys some characters (escape
sequences, marks that turn the direction of text), so none of those reaches it from a trace.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from vllm_trace.documents import as_json

_OBEYED = {
    **{code: 0x2400 + code for code in range(0x20) if chr(code) not in "\t\n"},
    0x7F: 0x2421,
    **dict.fromkeys(range(0x80, 0xA0), 0xFFFD),
    **dict.fromkeys((0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)), 0xFFFD),
}
"""Characters that a terminal obeys → pictures of them, or the mark of an unknown one."""


def clean(text: str) -> str:
    """The text with pictures in place of what a terminal would obey."""
    return text if text.isprintable() else text.translate(_OBEYED)


def console() -> Any:
    """The terminal; 80 columns when stdout is none."""
    from rich.console import Console
    from rich.segment import Segment

    class Terminal(Console):
        def render(self, renderable: Any, options: Any = None) -> Iterable[Segment]:
            for part in super().render(renderable, options):
                yield part if part.control else Segment(clean(part.text), part.style)

    # Brackets and colons in a name are what they are.
    width = None if sys.stdout.isatty() else 80
    return Terminal(width=width, highlight=False, markup=False, emoji=False)


def print_text(what: Any) -> None:
    """On a terminal in colour and as wide as it is, else as plain text of 80 columns."""
    from vllm_trace import render

    if sys.stdout.isatty():
        console().print(what)
    else:
        sys.stdout.write(clean(render.plain(what)))


def print_line(text: str) -> None:
    """Text that is laid out already, to stdout."""
    print(clean(text))


def say(text: str, hint: str = "") -> None:
    """A line to stderr, with who says it; a hint goes on lines of its own."""
    print(f"vllm-trace: {clean(text)}", file=sys.stderr)
    for line in hint.splitlines():
        print(f"  {clean(line)}", file=sys.stderr)


def print_json(document: Any) -> None:
    """One document, and nothing else."""
    print(as_json(document))
