"""Numbers of things, in the grammar of a sentence."""

from __future__ import annotations


def counted(number: int, things: str) -> str:
    """The number with its noun, which is given in the plural.

    >>> counted(2, "requests"), counted(1, "requests"), counted(1, "tenancies of blocks")
    ('2 requests', '1 request', '1 tenancy of blocks')
    """
    if number == 1:
        noun, of, rest = things.partition(" of ")
        things = (f"{noun[:-3]}y" if noun.endswith("ies") else noun.removesuffix("s")) + of + rest
    return f"{number} {things}"


def were(number: int) -> str:
    """``was`` or ``were``, for so many."""
    return "was" if number == 1 else "were"
