"""Spans as the bytes of OTLP protobuf, in batches: each is an export request, ready to be sent or written.

A span's ids, flags and times are in fixed places, name and kind are its form's, and attributes are
made in ``span_bytes``: a span is one ``pack`` and one ``join``. Tests parse the result with
OpenTelemetry's own classes and compare it with what the SDK's encoder makes of the same spans.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping, Sequence
from typing import Any

from vllm_trace import __version__
from vllm_trace.export.span import U64, Form, Link, Resource, SpanEvent
from vllm_trace.export.span_bytes import (
    CHILD,
    END,
    LOCAL,
    PARENT_ID,
    REMOTE,
    ROOT,
    SPAN_ID,
    TRACE_ID,
    more,
    value_of,
    wire_of,
)
from vllm_trace.export.wire import SMALL, number, request, resource_spans

SCOPE = ("vllm_trace", __version__)
MAX_SPANS = 512
"""In a batch, as in the SDK's processor."""

MAX_BYTES = 1 << 20
"""In a batch, by a span more; gRPC receivers take 4 MiB unless told otherwise."""

_child, _root = struct.Struct("<" + CHILD).pack, struct.Struct("<" + ROOT).pack

_HEADS = [b"\x12" + size for size in SMALL]
"""Size of a span → the tag and the size that stand before it."""


class Batcher:
    """Gathers spans until they are a batch: an export request as bytes."""

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        self.full: list[tuple[bytes, int]] = []
        """Batches that wait to be taken: (bytes, number of spans)."""
        self._extra = resource_from(environ)
        self._begin()

    def _begin(self) -> None:
        self._room, self._size = MAX_SPANS, 0
        self._spans: dict[int, tuple[Resource, list[bytes]]] = {}
        self._last: Resource | None = None
        """Of the last span; ``_made`` are the spans of it."""
        self._made: list[bytes] = []

    def add(
        self,
        resource: Resource,
        form: Form,
        trace_id: bytes,
        span_id: bytes,
        parent_id: bytes,
        start_ns: int,
        end_ns: int,
        values: tuple[Any, ...] = (),
        events: Sequence[SpanEvent] = (),
        links: Sequence[Link] = (),
        error: str = "",
        remote_parent: bool = False,
        dropped_events: int = 0,
    ) -> None:
        """Take a span in: the fields of ``Span``, in their order."""
        if resource is not self._last:
            self._last = resource
            self._made = self._spans.setdefault(id(resource), (resource, []))[1]
        name, tables, quick = form.wire or wire_of(form)
        try:
            made = quick and quick(trace_id, span_id, parent_id, start_ns, end_ns, values)
            if not made:
                if parent_id:
                    head = _child(
                        TRACE_ID, trace_id, SPAN_ID, span_id, PARENT_ID, parent_id,
                        REMOTE if remote_parent else LOCAL, start_ns, END, end_ns,
                    )  # fmt: skip
                else:
                    head = _root(TRACE_ID, trace_id, SPAN_ID, span_id, LOCAL, start_ns, END, end_ns)
                made = b"".join([head, name, *map(value_of, tables, values)])
        except struct.error:
            times = _as_64_bits(start_ns), _as_64_bits(end_ns)
            return self.add(
                resource, form, trace_id, span_id, parent_id, *times, values, events, links, error,
                remote_parent, dropped_events,
            )  # fmt: skip
        if events or links or error or dropped_events:
            made += more(events, links, error, dropped_events)
        size = len(made)
        self._made.append((_HEADS[size] if size < 1 << 14 else b"\x12" + number(size)) + made)
        self._size += size
        self._room -= 1
        if not self._room or self._size >= MAX_BYTES:
            self.cut()

    def cut(self) -> None:
        """What is here is a batch, if anything is."""
        count = MAX_SPANS - self._room
        if count:
            data = request(
                resource_spans(resource, SCOPE, made, self._extra)
                for resource, made in self._spans.values()
            )
            self.full.append((data, count))
            self._begin()

    def take(self) -> list[tuple[bytes, int]]:
        """The batches that are full, each once."""
        full, self.full = self.full, []
        return full


def _as_64_bits(time: int) -> int:
    """A time that no clock shows."""
    time &= U64
    return time - (1 << 64) if time >> 63 else time


def resource_from(environ: Mapping[str, str]) -> dict[str, Any]:
    """What ``OTEL_SERVICE_NAME`` and ``OTEL_RESOURCE_ATTRIBUTES`` say, by the SDK's reading of them."""
    if not any(environ.get(name) for name in ("OTEL_SERVICE_NAME", "OTEL_RESOURCE_ATTRIBUTES")):
        return {}
    from opentelemetry.sdk.resources import OTELResourceDetector

    return dict(OTELResourceDetector().detect().attributes)
