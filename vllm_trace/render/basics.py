"""What every view is put together from: tables, units, names, block ids."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from typing import Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.padding import Padding
from rich.table import Column, Table
from rich.text import Text

MAX_ROWS = 12
"""Rows of a table before the middle is left out, in a summary for reading."""

MAX_NAME = 22
"""Characters of a request's name in a table."""


def plain(what: RenderableType, width: int = 80) -> str:
    """As text for a file or a pipe: no colour, no blanks at the end of a line."""
    text = io.StringIO()
    # Brackets and colons in a name are what they are.
    console = Console(
        file=text, width=width, color_system=None, highlight=False, markup=False, emoji=False
    )
    console.print(what)
    return "".join(line.rstrip() + "\n" for line in text.getvalue().splitlines())


class Fitted(Table):
    """A table that leaves out columns, in the order of ``spare``, where there is no room for all of them."""

    spare: Sequence[int] = ()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        every, missing = self.columns, []
        self.columns = list(every)
        for index in self.spare:
            if _room_for(self.columns) <= options.max_width:
                break
            self.columns.remove(every[index])
            missing.append(str(every[index].header))
        try:
            yield from super().__rich_console__(console, options)
        finally:
            self.columns = every
        if missing:
            yield Text(f"no room for: {', '.join(missing)}", style="dim")


def _room_for(columns: Sequence[Column]) -> int:
    """Characters that columns need: numbers whole, text in lines of a few words."""
    widths = []
    for column in columns:
        cells = [column.header, *column.cells]
        widest = max(cell_len(str(cell)) for cell in cells)
        widths.append(widest if column.justify == "right" else min(widest, 12))
    return sum(widths) + 2 * (len(widths) - 1)


def table(
    *columns: str, title: str = "", left: Sequence[int] = (0,), spare: Sequence[int] = ()
) -> Table:
    """A plain table; columns are right-aligned but those whose index is in ``left``.

    ``spare``: which columns a narrow terminal does without, the first one first.
    """
    made = Fitted(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    made.spare = spare
    for index, column in enumerate(columns):
        made.add_column(column, justify="left" if index in left else "right", header_style="dim")
    return made


def duration(ns: float) -> str:
    """Three significant digits with a unit: ``1.53 ms``, ``48.0 µs``."""
    for unit, size in (("s", 1e9), ("ms", 1e6), ("µs", 1e3)):
        if ns >= size * 0.9995:  # what rounds to 1000 of a unit is 1 of the next
            value = ns / size
            return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} {unit}"
    return f"{ns:.0f} ns"


def size(num_bytes: float) -> str:
    """Three significant digits with a unit: ``1.50 MB``."""
    for unit, bytes_of in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= bytes_of:
            value = num_bytes / bytes_of
            return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} {unit}"
    return f"{num_bytes:.0f} B"


def short_name(name: str, limit: int = MAX_NAME) -> str:
    """A long name without its middle, on one line: ``cmpl-5d70e5a5…0-b2c81d3e``."""
    name = name.replace("\n", "\u240a")
    if len(name) <= limit:
        return name
    tail = limit // 2
    return f"{name[: limit - tail - 1]}…{name[-tail:]}"


def shorten(rows: Sequence[Any], limit: int = MAX_ROWS) -> list[Any]:
    """The rows, or their head and tail with a None between."""
    if len(rows) <= limit:
        return list(rows)
    head = limit * 2 // 3
    return [*rows[:head], None, *rows[len(rows) - (limit - head - 1) :]]


def ids(blocks: Iterable[int], limit: int = 10) -> str:
    """Block ids with runs folded: ``1–5 9 12``; the null block is ``·``."""
    runs: list[list[int]] = []
    for block in blocks:
        if runs and block == runs[-1][1] + 1 and block:
            runs[-1][1] = block
        else:
            runs.append([block, block])
    words = ["·" if not a else f"{a}" if a == b else f"{a}–{b}" for a, b in runs]
    if len(words) > limit:
        words = [*words[: limit - 2], "…", words[-1]]
    return " ".join(words)


def mapping(table: Sequence[Sequence[int]], limit: int = 6) -> str:
    """``0→1–3 3→9``: runs of logical blocks and where they are; groups separated by ``|``."""
    groups = []
    for row in table:
        parts: list[str] = []
        start = 0
        while start < len(row):
            end = start
            while end + 1 < len(row) and row[end + 1] == row[end] + 1 and row[start]:
                end += 1
            parts.append(f"{start}→{ids(row[start : end + 1])}")
            start = end + 1
        if len(parts) > limit:
            parts = [*parts[: limit - 1], f"… {parts[-1]}"]
        groups.append(" ".join(parts))
    return " | ".join(groups)


def titled(title: str, body: RenderableType) -> RenderableType:
    return Group(Text(title, style="bold"), Padding(body, (0, 0, 1, 2)))
