"""Spans of a trace, by their requests; and the events of one request."""

from __future__ import annotations

from typing import Any

import recorded

from vllm_trace.export import attributes as a
from vllm_trace.export.span import Span

CLIENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
"""What a client sends as ``traceparent``."""


def one_request(**arrival: Any) -> list[Any]:
    """Two steps of a request of 6 tokens; ``arrival`` is more of what it came with."""
    made = [
        recorded.engine(),
        recorded.arrived(0, "r", 6, **arrival),
        *recorded.admitted(0, 6, [1, 2], free=6),
        recorded.step(1, [0], [6], free=6, new=[0]),
        recorded.updated(1, [[7]]),
        recorded.step(2, [0], [1], free=6),
        recorded.updated(2, [[8]]),
        *recorded.ended(0, [1, 2]),
    ]
    made[-1].at_ns, made[-1].num_output_tokens = 26, 2
    return made


def roots(found: list[Span]) -> dict[str, Span]:
    return {one.attributes[a.REQUEST_ID]: one for one in found if one.name == "llm_request"}


def children(found: list[Span], root: Span, *names: str) -> list[Span]:
    """In the order of time."""
    mine = [s for s in found if s.trace_id == root.trace_id and s is not root]
    return sorted((s for s in mine if not names or s.name in names), key=lambda s: s.start_ns)


def assert_trees(found: list[Span], remote: frozenset[bytes] = frozenset()) -> None:
    """Ids are ids, parents are there, children and events lie within, in order."""
    by_id = {(one.trace_id, one.span_id): one for one in found}
    assert len(found) == len(by_id) == len({one.span_id for one in found})
    for one in found:
        assert 16 == len(one.trace_id) and any(one.trace_id) and 8 == len(one.span_id)
        assert any(one.span_id) and one.start_ns <= one.end_ns
        times = [event.at_ns for event in one.events]
        assert sorted(times) == times, one
        assert all(one.start_ns <= at <= one.end_ns for at in times), one
        if one.parent_id and one.parent_id not in remote:
            parent = by_id[one.trace_id, one.parent_id]
            assert parent.start_ns <= one.start_ns <= one.end_ns <= parent.end_ns, (parent, one)
