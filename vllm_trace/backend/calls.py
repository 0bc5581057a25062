"""What our backend did in one forward, told to whoever observes: the recorder, while tracing is on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class KernelCall(NamedTuple):
    """One kernel of one layer's forward: decode or prefill."""

    kernel: str
    variant: str
    """``V1``, ``V2``, or ``prefill``."""
    reason: str
    numbers: dict[str, int]
    started_ns: int
    dur_ns: int
    """On the host."""
    marks: tuple[Any, Any]
    """On the device before and after; (None, None) on the CPU."""
    rows: tuple[int, int]
    """First and last-but-one row of the batch that it computed."""


Observer = Callable[[Any, Any, Any, Any, Any, Any, list[KernelCall]], None]
"""``observer(impl, layer, query, kv_cache, metadata, output, calls)`` after each forward."""

observer: Observer | None = None


def observe(function: Observer | None) -> None:
    """Set or take away the observer of this process."""
    global observer
    observer = function
