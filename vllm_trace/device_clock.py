"""Times on a device without waiting for it: events on the stream now, read when they have passed.

A *mark* is a CUDA event on the stream that the work of a call goes to. On the CPU there is none: a call is over when
it returns, and the monotonic clock is enough. While a CUDA graph is captured there is none either, because the event
would become a part of the graph.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

_free: list[Any] = []
"""Marks that were read: making a CUDA event costs more than recording one."""

MAX_FREE = 4096


def mark(tensor: Any) -> Any:
    """A mark after everything that was launched on the tensor's device so far, or None."""
    if tensor is None or not tensor.is_cuda:
        return None
    cuda = sys.modules["torch"].cuda
    if cuda.is_current_stream_capturing():
        return None
    event = _free.pop() if _free else cuda.Event(enable_timing=True)
    event.record()
    return event


def passed(marks: Iterable[Any], wait: bool = False) -> bool:
    """Whether the device is past all of them. ``wait`` is for the end of a trace, never for a step."""
    for one in marks:
        if one is not None:
            if wait:
                one.synchronize()
            elif not one.query():
                return False
    return True


def elapsed_ns(first: Any, last: Any) -> int:
    """Time between two marks that have passed."""
    return round(first.elapsed_time(last) * 1e6)


def give_back(marks: Iterable[Any]) -> None:
    """They were read and can be recorded anew."""
    for one in marks:
        if one is not None and len(_free) < MAX_FREE:
            _free.append(one)
