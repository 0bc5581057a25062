"""Numbers in a violation's words."""

from __future__ import annotations

from typing import Any


def listed(numbers: Any, most: int = 8) -> str:
    """``5, 6, 7``, cut when it is long."""
    shown = [*numbers]
    text = ", ".join(map(str, shown[:most]))
    return text if len(shown) <= most else f"{text} … ({len(shown)} in all)"


def many(number: int, noun: str) -> str:
    """``1 block``, ``2 blocks``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
