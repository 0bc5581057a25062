"""Our bytes against OpenTelemetry's own encoder, and against its own classes."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import msgspec
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
from vllm_trace.events import Event
from vllm_trace.export import attributes, batcher, span_bytes, wire
from vllm_trace.export.batcher import SCOPE, Batcher
from vllm_trace.export.forms import EVENTS, SPANS
from vllm_trace.export.span import SERVER, Form, Link, Resource, Span, SpanEvent
from vllm_trace.export.span_bytes import Values
from vllm_trace.export.spans import SpanFold, spans
from vllm_trace.trace import read_trace

GOLD = Path(__file__).resolve().parent.parent / "gold"
TRACES = sorted(path.stem for path in GOLD.glob("*.vtrace"))


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


def of_batches(taken: Batcher) -> ExportTraceServiceRequest:
    taken.cut()
    return decoded(b"".join(data for data, _ in taken.take()))


def ours(found: list[Span]) -> ExportTraceServiceRequest:
    made = Batcher({})
    for span in found:
        made.add(*msgspec.structs.astuple(span))
    return of_batches(made)


def spans_of(message: ExportTraceServiceRequest) -> list[Any]:
    """(resource, span) in their order, however they are batched."""
    return [
        (sorted(map(str, part.resource.attributes)), span)
        for part in message.resource_spans
        for scope in part.scope_spans
        for span in scope.spans
    ]


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
                span.ClearField("dropped_events_count")  # not in the SDK's spans, which drop none
    return message


@cache
def events_of(name: str) -> tuple[dict[str, Any], list[Event]]:
    trace = read_trace(GOLD / f"{name}.vtrace")
    return trace.header, list(trace.events())


def folded(name: str, cut: float, fold: SpanFold) -> None:
    """A golden trace to some part of it: what is open then is exported too."""
    header, events = events_of(name)
    fold.feed(fold.open(header), events[: int(cut * len(events))])
    fold.end()


@given(
    name=st.sampled_from(TRACES), detail=st.booleans(), tokens=st.booleans(),
    cut=st.one_of(st.just(1.0), st.floats(0, 1)), max_steps=st.sampled_from([2, 16, 1024]),
    size=st.sampled_from([3, 512]),
)  # fmt: skip
def test_the_bytes_are_what_the_sdks_encoder_makes(name, detail, tokens, cut, max_steps, size):
    """Span by span: those that became bytes at once against objects that the SDK encodes."""
    options = {"detail": detail, "tokens": tokens, "max_steps": max_steps}
    plain = SpanFold(**options)
    folded(name, cut, plain)
    found = plain.take()
    expected = without_what_differs(encode_spans([readable(span) for span in found]))
    before, batcher.MAX_SPANS = batcher.MAX_SPANS, size
    try:
        made = Batcher({})
        folded(name, cut, SpanFold(emit=made.add, **options))
        actual = without_what_differs(of_batches(made))
    finally:
        batcher.MAX_SPANS = before
    by_id = {
        (span.trace_id, span.span_id): (resource, span) for resource, span in spans_of(expected)
    }
    assert len(by_id) == len(found)
    assert by_id == {(span.trace_id, span.span_id): (who, span) for who, span in spans_of(actual)}
    assert {scope.scope.name for part in actual.resource_spans for scope in part.scope_spans} <= {
        SCOPE[0]
    }


def test_forms_have_the_attributes_that_the_table_gives_their_spans():
    for form in SPANS + EVENTS:
        names = [n for key in form.keys for n in ((key,) if isinstance(key, str) else key)]
        assert len(names) == len(set(names))
        for name in names:
            on = attributes.ATTRIBUTES[name].on.split()
            assert form.name in on or "any" in on, (form.name, name)
    assert {form.name for form in SPANS} == attributes.SPANS.keys()
    assert {form.name for form in EVENTS} == attributes.EVENTS.keys()


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
    for name, wanted in given_attributes.items():
        values = Values(0x4A, name)
        assert b"" == values[None]
        for _ in range(2):  # made, and known
            made = values[wanted]
            assert 0x4A == made[0]
            size = len(made) - 1 - len(wire.varint(len(made)))
            message = KeyValue.FromString(made[-size:] if size > 127 else made[2:])
            expected = list(wanted) if isinstance(wanted, tuple) else wanted
            assert (name, expected) == (message.key, value(message.value))


@given(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=400))
def test_a_name_remembers_a_bounded_number_of_values(numbers):
    before, span_bytes.MAX_KNOWN = span_bytes.MAX_KNOWN, 16
    try:
        values = Values(0x4A, "n")
        for number in numbers:
            for one in (number, (number,), (number, 1)):
                message = KeyValue.FromString(values[one][2:])
                assert (list(one) if isinstance(one, tuple) else one) == value(message.value)
        assert len(values) <= 18
    finally:
        span_bytes.MAX_KNOWN = before


@given(st.integers(-(2**63), 2**64 - 1))
def test_a_number_by_tables_is_a_varint(number):
    assert wire.varint(number) == wire.number(number)


ID = st.binary(min_size=8, max_size=8)


@given(
    trace_id=st.binary(min_size=16, max_size=16), ids=st.lists(ID, min_size=4, max_size=4),
    times=st.lists(st.integers(-(2**64), 2**65), min_size=3, max_size=3), name=st.text(min_size=1),
    error=st.text(), dropped=st.integers(0, 2**31), remote=st.booleans(), root=st.booleans(),
)  # fmt: skip
def test_any_span_comes_back_as_it_was(
    trace_id, ids, times, name, error, dropped, remote, root
):  # fmt: skip
    start, end, at = times
    form = Form(name, "vllm_trace.step", ("vllm_trace.mode", "vllm_trace.rank"), kind=SERVER)
    span = Span(
        Resource({"host.name": "h"}), form, trace_id, ids[0], b"" if root else ids[1], start, end,
        (end, ("eager", None)), [SpanEvent(Form(name, "vllm_trace.step"), at, (3,))],
        [Link(trace_id, ids[2])], error, remote, dropped,
    )  # fmt: skip
    (part,) = ours([span]).resource_spans
    (made,) = part.scope_spans[0].spans
    assert (trace_id, ids[0], b"" if root else ids[1]) == (
        made.trace_id, made.span_id, made.parent_span_id,
    )  # fmt: skip
    start, end, at = (time % 2**64 for time in times)  # no clock shows others
    assert {"vllm_trace.step", "vllm_trace.mode"} == {one.key for one in made.attributes}
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
    parts = [ours([span]).SerializeToString() for span in found]
    message = decoded(b"".join(parts))
    assert [s.span_id for s in found] == [
        p.scope_spans[0].spans[0].span_id for p in message.resource_spans
    ]


def test_what_is_not_unicode_is_replaced():
    made = wire.any_value("a\ud800b")
    assert b"a?b" in made
