"""Whether the rooms that look at every event run as C (``setup.py``) or as plain Python."""

from __future__ import annotations

from importlib.machinery import EXTENSION_SUFFIXES
from importlib.util import find_spec

ONE_OF_THEM = "vllm_trace.tracewriter"
"""They are compiled all together or not at all."""


def is_compiled() -> bool:
    """Whether this process has, or would load, the compiled rooms."""
    spec = find_spec(ONE_OF_THEM)
    return spec is not None and str(spec.origin).endswith(tuple(EXTENSION_SUFFIXES))
