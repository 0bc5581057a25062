"""Spans of a trace, by their requests."""

from __future__ import annotations

from vllm_trace.export import attributes as a
from vllm_trace.export.span import Span


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
