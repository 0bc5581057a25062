"""What can go wrong, as values a command line can print.

Every error carries a ``slug`` (its anchor in the README) and a ``hint`` (what to do next).
Library code raises; only ``cli.py`` prints.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

MOST_LISTED = 24
"""Known names that are listed where one is not known."""


class VllmTraceError(Exception):
    """Base of all errors that this package raises on purpose."""

    slug = "errors"

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class UsageError(VllmTraceError):
    """A name or value given by the user is not one that exists."""

    slug = "usage"


class HookError(VllmTraceError):
    """The installed vLLM does not have what a required hook needs; nothing was changed."""

    slug = "hooks"


class TraceError(VllmTraceError):
    """A trace cannot be read: empty, foreign, damaged, or of a newer schema."""

    slug = "trace-files"


class EngineError(VllmTraceError):
    """The engine could not be started, or did not do what was asked of it."""

    slug = "engine"


def unknown(what: str, name: str, known: Iterable[str], slug_hint: str = "") -> UsageError:
    """Build the error for a name that is not known, with the nearest one that is.

    >>> str(unknown("scenario", "prefx", ["prefix", "preempt"]))
    "unknown scenario 'prefx'; did you mean 'prefix'?"
    """
    names = sorted(known)
    near = get_close_matches(name, names, n=1, cutoff=0.4)
    ask = f"; did you mean {near[0]!r}?" if near else ""
    listed = ", ".join(names[:MOST_LISTED])
    more = f" and {len(names) - MOST_LISTED} more" if len(names) > MOST_LISTED else ""
    return UsageError(f"unknown {what} {name!r}{ask}", hint=slug_hint or f"Known: {listed}{more}")
