"""Whether the readers' rooms that look at every event run as C (``setup.py``) or as plain Python.

Both do the same. Compiled classes cannot be changed while they run, nor inherited from, nor stepped through: whoever
wants to experiment with ``mini`` sets ``VTRACE_PLAIN=1``, and the sources beside the compiled files are what runs.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import (
    EXTENSION_SUFFIXES,
    SOURCE_SUFFIXES,
    FileFinder,
    ModuleSpec,
    SourceFileLoader,
)
from importlib.util import find_spec
from types import ModuleType

ONE_OF_THEM = "vllm_trace.mini.block_pool"
"""They are compiled all together or not at all."""


def is_compiled() -> bool:
    """Whether this process has, or would load, the compiled rooms."""
    spec = find_spec(ONE_OF_THEM)
    return spec is not None and str(spec.origin).endswith(tuple(EXTENSION_SUFFIXES))


class Sources:
    """Finds the modules of this package as Python, whatever else has their names."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not name.startswith("vllm_trace."):
            return None
        for folder in path or ():
            found = FileFinder(folder, (SourceFileLoader, SOURCE_SUFFIXES)).find_spec(name)
            if found is not None:
                return found
        return None


def use_sources() -> None:
    """Have all that is imported from here on come from the sources."""
    sys.meta_path.insert(0, Sources)
