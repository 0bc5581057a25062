"""How ``explain`` and ``diff`` say numbers, names and steps, and how a story is laid out."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

WIDTH = 80


def many(number: int, noun: str) -> str:
    """``1 block``, ``2 blocks``, ``no blocks``."""
    return f"{number or 'no'} {noun}{'' if number == 1 else 's'}"


def times(number: int) -> str:
    """``once``, ``twice``, ``3 times``."""
    return {1: "once", 2: "twice"}.get(number, f"{number} times")


def listed(names: Sequence[str], limit: int = 3) -> str:
    """``a``, ``a and b``, ``a, b, c and 12 more``."""
    shown = list(names[:limit])
    rest = len(names) - len(shown)
    if rest:
        return f"{', '.join(shown)} and {rest} more"
    return " and ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)


def span(first: int, last: int) -> str:
    """``4``, or ``4–9``."""
    return f"{first}" if first == last else f"{first}–{last}"


def steps(first: int, last: int) -> str:
    """``step 4``, or ``steps 4–9``."""
    return f"step{'' if first == last else 's'} {span(first, last)}"


def ids(blocks: Sequence[int], limit: int = 10) -> str:
    """Block ids with rising runs of three and more folded: ``1–5 9 12``; the null block is ``·``."""
    words: list[str] = []
    at = 0
    while at < len(blocks):
        end = at
        while end + 1 < len(blocks) and blocks[end + 1] == blocks[end] + 1 and blocks[at]:
            end += 1
        if end - at < 2:
            end = at
        first = "·" if not blocks[at] else str(blocks[at])
        words.append(first if end == at else f"{first}–{blocks[end]}")
        at = end + 1
    if len(words) > limit:
        words = [*words[: limit - 2], "…", words[-1]]
    return " ".join(words)


def groups(tables: Sequence[Sequence[int]]) -> str:
    """The ids of each KV-cache group: ``1–3``, or ``1–3 | 4 5`` for two groups."""
    return " | ".join(ids(row) for row in tables)


def flat(tables: Sequence[Sequence[int]]) -> list[int]:
    """All ids of all groups, the null block left out."""
    return [block for row in tables for block in row if block]


def wrapped(label: Any, text: str, *, margin: int = 8, width: int = WIDTH) -> list[str]:
    """The text in a column of its own, right of a label."""
    head = f"{label:>{margin - 2}}  "
    return textwrap.wrap(
        text,
        width,
        initial_indent=head,
        subsequent_indent=" " * margin,
        break_long_words=True,
        break_on_hyphens=False,
    )
