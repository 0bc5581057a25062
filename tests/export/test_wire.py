"""Our bytes against OpenTelemetry's own encoder, and against its own classes."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import KeyValue
from opentelemetry.sdk import resources
from opentelemetry.sdk import trace as sdk
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link as SdkLink
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags

from export.receiver import value
from vllm_trace.export import wire
from vllm_trace.export.span import SERVER, Link, Resource, Span, SpanEvent
from vllm_trace.export.spans import SpanFold, spans
from vllm_trace.trace import read_trace

GOLD = Path(__file__).resolve().parent.parent / "gold"
SCOPE = ("vllm_trace", "0.1.0")


def readable(span: Span) -> sdk.ReadableSpan:
    """The same span as an object of the SDK."""

    def context(trace_id: bytes, span_id: bytes, remote: bool = False) -> SpanContext:
        numbers = int.from_bytes(trace_id, "big"), int.from_bytes(span_id, "big")
        return SpanContext(*numbers, is_remote=remote, trace_flags=TraceFlags(1))

    parent = context(span.trace_id, span.parent_id, span.remote_parent) if span.parent_id else None
    return sdk.ReadableSpan(
        name=span.name,
        context=context(span.trace_id, span.span_id),
        parent=parent,
        resource=resources.Resource(span.resource.attributes),
        attributes=span.attributes,
        events=[sdk.Event(e.name, e.attributes, e.at_ns) for e in span.events],
        links=[SdkLink(context(one.trace_id, one.span_id)) for one in span.links],
        kind=SpanKind.SERVER if span.kind == SERVER else SpanKind.INTERNAL,
        status=Status(StatusCode.ERROR, span.error) if span.error else Status(),
        start_time=span.start_ns,
        end_time=span.end_ns,
        instrumentation_scope=InstrumentationScope(*SCOPE),
    )


def decoded(data: bytes) -> ExportTraceServiceRequest:
    return ExportTraceServiceRequest.FromString(data)


def ours(found: list[Span]) -> ExportTraceServiceRequest:
    made = [wire.span(span) for span in found]
    return decoded(wire.request([wire.resource_spans(found[0].resource, SCOPE, made, {})]))


def without_what_differs(message: ExportTraceServiceRequest) -> ExportTraceServiceRequest:
    """The SDK writes no trace flags, and an empty status where we write none."""
    for part in message.resource_spans:
        for scope in part.scope_spans:
            for span in scope.spans:
                span.flags &= ~0xFF
                for link in span.links:
                    link.flags &= ~0xFF
                if span.status.code == 0:
                    span.ClearField("status")
    return message


@pytest.mark.parametrize("name", ["abort", "chunked", "evict", "hello", "preempt"])
def test_the_bytes_are_what_the_sdks_encoder_makes(name):
    found = list(spans(read_trace(GOLD / f"{name}.vtrace"), SpanFold(detail=True)))
    expected = without_what_differs(encode_spans([readable(span) for span in found]))
    assert expected == without_what_differs(ours(found))


@given(
    st.dictionaries(
        st.text(min_size=1, max_size=200),
        st.one_of(
            st.integers(-(2**63), 2**63 - 1),
            st.text(),
            st.booleans(),
            st.floats(allow_nan=False),
            st.lists(st.integers(-(2**63), 2**63 - 1)).map(tuple),
            st.lists(st.text()).map(tuple),
        ),
        max_size=8,
    )
)
def test_any_attribute_comes_back_as_it_was(given_attributes):
    for encoder in (wire._Attributes(0x4A), wire._Attributes(0x4A)):
        for _ in range(2):  # made, and known
            for name, made in zip(given_attributes, map(encoder.of, given_attributes.items())):
                assert 0x4A == made[0]
                size = len(made) - 1 - len(wire.varint(len(made)))
                message = KeyValue.FromString(made[-size:] if size > 127 else made[2:])
                expected = given_attributes[name]
                expected = list(expected) if isinstance(expected, tuple) else expected
                assert (name, expected) == (message.key, value(message.value))


ID = st.binary(min_size=8, max_size=8)


@given(
    trace_id=st.binary(min_size=16, max_size=16), ids=st.lists(ID, min_size=4, max_size=4),
    times=st.lists(st.integers(0, 2**63), min_size=3, max_size=3), name=st.text(min_size=1),
    error=st.text(), dropped=st.integers(0, 2**31), remote=st.booleans(), root=st.booleans(),
)  # fmt: skip
def test_any_span_comes_back_as_it_was(
    trace_id, ids, times, name, error, dropped, remote, root
):  # fmt: skip
    start, end, at = times
    span = Span(
        trace_id, ids[0], b"" if root else ids[1], name, start, end, Resource({"host.name": "h"}),
        {"vllm_trace.step": end}, SERVER, [SpanEvent(at, name, {"vllm_trace.step": 3})],
        [Link(trace_id, ids[2])], error, remote, dropped,
    )  # fmt: skip
    (part,) = ours([span]).resource_spans
    (made,) = part.scope_spans[0].spans
    assert (trace_id, ids[0], b"" if root else ids[1]) == (
        made.trace_id, made.span_id, made.parent_span_id,
    )  # fmt: skip
    assert (name, 2, start, end, dropped) == (
        made.name, made.kind, made.start_time_unix_nano, made.end_time_unix_nano,
        made.dropped_events_count,
    )  # fmt: skip
    assert (error, 2 if error else 0) == (made.status.message, made.status.code)
    assert (at, name) == (made.events[0].time_unix_nano, made.events[0].name)
    assert (trace_id, ids[2]) == (made.links[0].trace_id, made.links[0].span_id)
    remote_bits = 0x300 if remote and not root else 0x100
    assert remote_bits | 1 == made.flags


def test_batches_one_after_the_other_are_one_message():
    found = list(spans(read_trace(GOLD / "hello.vtrace")))
    parts = [wire.resource_spans(s.resource, SCOPE, [wire.span(s)], {}) for s in found]
    message = decoded(wire.request(parts))
    assert [s.span_id for s in found] == [
        p.scope_spans[0].spans[0].span_id for p in message.resource_spans
    ]


def test_what_is_not_unicode_is_replaced():
    made = wire.any_value("a\ud800b")
    assert b"a?b" in made
