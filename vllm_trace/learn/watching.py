"""Waits for a file to be saved: by watchfiles, or by looking at it twice a second."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

POLL_S = 0.5


def changes(path: Path) -> Iterator[None]:
    """Yield each time the file was saved; ends with the process."""
    try:
        from watchfiles import watch
    except ImportError:
        yield from polled(path)
        return
    # Editors write beside and rename, so the folder is watched and not the file.
    before = _stamp(path)
    for _ in watch(path.parent, recursive=False, debounce=200, raise_interrupt=True):
        now = _stamp(path)
        if now and now != before:
            before = now
            yield None


def polled(path: Path) -> Iterator[None]:
    """The same without watchfiles."""
    before = _stamp(path)
    while True:
        time.sleep(POLL_S)
        now = _stamp(path)
        if now and now != before:
            before = now
            yield None


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None  # between an editor's two steps
    return stat.st_mtime_ns, stat.st_size
