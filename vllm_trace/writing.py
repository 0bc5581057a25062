"""A file that is there whole under its name, or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

PREFIX = ".vllm-trace."
"""Of what is not whole yet."""


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A binary file that takes its name when the block ends well, and goes away else.

    Raises: ``OSError`` when it cannot be written.
    """
    if path.is_dir():
        raise IsADirectoryError(0, "it is a folder")
    number, name = tempfile.mkstemp(prefix=PREFIX, suffix=".part", dir=path.parent)
    part = Path(name)
    try:
        with os.fdopen(number, "wb") as out:
            yield out
        part.chmod(mode_of_a_new_file(0o666))
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def mode_of_a_new_file(wanted: int) -> int:
    """What ``open`` would have given; temporary files are made for their owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    return wanted & ~mask
