"""Which request is meant when a user names one.

vLLM may have made another name of the user's: since 0.14 it puts a dash and eight random hex digits behind it, so
that ``0`` is ``0-a4c7ca3e`` in a trace. A name may also come again in one trace.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from vllm_trace.errors import UsageError, unknown

CANDIDATES = 8
"""Listed when a name is ambiguous."""

_RANDOM_DIGITS = re.compile(r"-[0-9a-f]{8}$")


def without_random_digits(name: str) -> str:
    """The name that the user gave, where vLLM made another one of it."""
    return _RANDOM_DIGITS.sub("", name)


def is_called(number: int, name: str, asked: str) -> bool:
    """Whether the request is the one asked for: its number, its name, or what vLLM made that name of."""
    return asked in (name, f"#{number}", without_random_digits(name))


def requests_called(names: Mapping[int, str], asked: str) -> list[int]:
    """Numbers of the request that is asked for, all of one name; more than one where the name came again.

    The best that there is: ``#NUMBER``; the name itself; the name without vLLM's random digits; a part of the
    name that no other has.

    Raises: ``UsageError`` when there is none, or when several names may be meant.
    """
    own = [number for number in names if asked == f"#{number}"]
    own = own or [number for number, name in names.items() if name == asked]
    own = own or [number for number, name in names.items() if is_called(number, name, asked)]
    if not own and asked:
        own = [number for number, name in names.items() if asked in name]
    if not own:
        raise unknown("request", asked, set(names.values()))
    if len({names[number] for number in own}) > 1:
        some = ", ".join(f"{names[number]} (#{number})" for number in own[:CANDIDATES])
        more = f" and {len(own) - CANDIDATES} more" if len(own) > CANDIDATES else ""
        raise UsageError(
            f"{asked!r} may be any of {len(own)} requests: {some}{more}",
            hint=f"Give the whole name, or the number: #{own[0]}",
        )
    return own
