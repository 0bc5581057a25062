"""What must hold in every trace, and who broke it first.

``@invariant`` registers a rule, ``check`` judges a trace by all of them, ``pytest_plugin`` makes
tests of them. Nothing is imported until it is asked for: pytest loads this package in every run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_trace.invariants.books import Books
    from vllm_trace.invariants.checking import check
    from vllm_trace.invariants.judgements import Report
    from vllm_trace.invariants.registry import Invariant, Violation, invariant
    from vllm_trace.invariants.sources import EventList

__all__ = ["Books", "EventList", "Invariant", "Report", "Violation", "check", "invariant"]

_WHERE = {
    "Books": "books",
    "EventList": "sources",
    "Report": "judgements",
    "check": "checking",
    "Invariant": "registry",
    "Violation": "registry",
    "invariant": "registry",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
