"""The one place that opens and closes what is exported: knows ``-``, removes what is half written."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from vllm_trace.errors import UsageError
from vllm_trace.export import ExportError
from vllm_trace.writing import PREFIX, mode_of_a_new_file, whole_file

STDOUT = "-"


@contextlib.contextmanager
def file(output: str) -> Iterator[BinaryIO]:
    """A binary file that is there under its name when the block ends well, and not at all else.

    ``-`` is stdout, as far as it gets. A device or a pipe is written to as it is.

    Raises: ``UsageError`` for stdout on a terminal, ``ExportError`` when it cannot be written.
    """
    if output == STDOUT:
        if sys.stdout.isatty():
            raise UsageError("the terminal is no place for it", hint="Give a file with -o")
        sys.stdout.flush()
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    path = Path(output)
    with _said(path):
        special = path.exists() and not path.is_file() and not path.is_dir()
    if special:
        with _said(path), open(path, "wb") as device:
            yield device
        return
    with _said(path), whole_file(path) as out:
        yield out


@contextlib.contextmanager
def folder(output: str, suffix: str) -> Iterator[Path]:
    """An empty folder that is there under its name when the block ends well, and not at all else.

    A folder that is there already is replaced if it holds nothing but files with ``suffix``.

    Raises: ``UsageError`` when it holds anything else, ``ExportError`` when it cannot be written.
    """
    if output == STDOUT:
        raise UsageError("several files do not fit into stdout", hint="Give a folder with -o")
    path = Path(output)
    with _said(path):
        others = (
            [one.name for one in path.iterdir() if one.suffix != suffix] if path.exists() else []
        )
        if others:
            raise UsageError(
                f"{path} holds {sorted(others)[0]}, which is no {suffix} file",
                hint="Give another folder with -o",
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=PREFIX, suffix=".part", dir=path.parent))
    try:
        with _said(path):
            yield part
            part.chmod(mode_of_a_new_file(0o777))
            if path.exists():
                shutil.rmtree(path)
            os.replace(part, path)
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextlib.contextmanager
def _said(path: Path) -> Iterator[None]:
    """An error of the file system as one of ours; a closed pipe stays what it is."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise ExportError(f"cannot write {path}: {error.strerror or error}") from None
