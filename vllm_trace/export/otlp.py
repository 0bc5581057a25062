"""``--to otlp``: spans to a receiver, or into a file of protobuf (one ``TracesData`` message)."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator, Mapping
from typing import Any

from vllm_trace import __version__
from vllm_trace.export import Exported, ExportOptions, _write, exporter, wire
from vllm_trace.export.endpoint import endpoint_of, is_url, sampler_of
from vllm_trace.export.span import Resource, Span
from vllm_trace.export.spans import SpanFold, finished
from vllm_trace.trace import Trace

SCOPE = ("vllm_trace", __version__)
MAX_SPANS = 512
"""In a batch, as in the SDK's processor."""

MAX_BYTES = 1 << 20
"""In a batch, by a span more; gRPC receivers take 4 MiB unless told otherwise."""

GIVE_UP = 2
"""Batches in a row that a receiver did not take."""


class Batcher:
    """Gathers spans until they are a batch: an export request as bytes."""

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        self.num_spans = 0
        self._size = 0
        self._spans: dict[int, tuple[Resource, list[bytes]]] = {}
        self._extra = resource_from(environ)

    def extend(self, found: list[Span]) -> Iterator[tuple[bytes, int]]:
        """Take spans in; yields each batch that gets full: (bytes, number of spans)."""
        encode, last = wire.span, None
        room, size = MAX_SPANS - self.num_spans, self._size
        pieces: list[bytes] = []
        for span in found:
            resource = span.resource
            if resource is not last:
                last = resource
                pieces = self._spans.setdefault(id(resource), (resource, []))[1]
            made = encode(span)
            pieces.append(made)
            room -= 1
            size += len(made)
            if not room or size >= MAX_BYTES:
                self.num_spans = MAX_SPANS - room
                yield self.take()
                room, size, last = MAX_SPANS, 0, None
        self.num_spans, self._size = MAX_SPANS - room, size

    def take(self) -> tuple[bytes, int]:
        """(bytes, number of spans) of the batch; a new one begins."""
        data = wire.request(
            wire.resource_spans(resource, SCOPE, made, self._extra)
            for resource, made in self._spans.values()
        )
        count, self.num_spans, self._size = self.num_spans, 0, 0
        self._spans = {}
        return data, count


def resource_from(environ: Mapping[str, str]) -> dict[str, Any]:
    """What ``OTEL_SERVICE_NAME`` and ``OTEL_RESOURCE_ATTRIBUTES`` say, by the SDK's reading of them."""
    if not any(environ.get(name) for name in ("OTEL_SERVICE_NAME", "OTEL_RESOURCE_ATTRIBUTES")):
        return {}
    from opentelemetry.sdk.resources import OTELResourceDetector

    return dict(OTELResourceDetector().detect().attributes)


def encoded(trace: Trace, fold: SpanFold) -> Iterator[tuple[bytes, int]]:
    """The trace's spans as export requests: (bytes, number of spans)."""
    batcher = Batcher()
    with fewer_collections():
        for found in finished(trace, fold):
            yield from batcher.extend(found)
        if batcher.num_spans:
            yield batcher.take()


@contextlib.contextmanager
def fewer_collections() -> Iterator[None]:
    """Spans are many, short-lived and in no circles: looking for garbage among them is in vain."""
    before = gc.get_threshold()
    gc.set_threshold(50_000, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


def new_fold(options: ExportOptions, **more: Any) -> SpanFold:
    """A fold with the user's options and OpenTelemetry's sampler."""
    limit = os.environ.get("OTEL_SPAN_EVENT_COUNT_LIMIT", "")
    if limit.isdigit() and int(limit) > 1:
        more.setdefault("max_steps", min(int(limit), more.get("max_steps", 1024)))
    return SpanFold(sampler_of(), detail=options.detail, tokens=options.tokens, **more)


@exporter(
    "otlp", "OpenTelemetry spans: to a receiver (a URL), or a file of protobuf", to="any",
    suffix=".binpb",
)  # fmt: skip
def export(trace: Trace, out: str, options: ExportOptions) -> Exported:
    """Send, or write. ``out`` is a URL, a file, ``-``, or empty for what the variables say."""
    fold = new_fold(options)
    if out and not is_url(out):
        done = _write_file(trace, out, fold)
    else:
        done = _send(trace, out, fold)
    done.notes += notes_of(trace, fold, options)
    return done


def _write_file(trace: Trace, out: str, fold: SpanFold) -> Exported:
    count = 0
    with _write.file(out) as file:
        for data, num_spans in encoded(trace, fold):
            file.write(data)
            count += num_spans
    return Exported({"spans": count, "requests": fold.num_requests, "events": fold.num_events})


def _send(trace: Trace, url: str, fold: SpanFold) -> Exported:
    """Batch after batch; a receiver that takes none of several in a row is given up."""
    from vllm_trace.export.sending import Batch, Delivered, Sender, undelivered

    endpoint = endpoint_of(url)
    sender, delivered, failed = Sender(endpoint), Delivered(), 0
    try:
        for data, num_spans in encoded(trace, fold):
            if failed >= GIVE_UP:
                delivered.drop(num_spans, "given up")
            elif sender.send(Batch(data, num_spans), delivered):
                failed = 0
            else:
                failed += 1
    finally:
        sender.close()
    if delivered.dropped and not delivered.sent:
        raise undelivered(delivered, endpoint.url)
    done = Exported({"spans": delivered.sent, "requests": fold.num_requests})
    if delivered.dropped:
        done.problems.append(f"{delivered.dropped} spans were not delivered: {delivered.text}")
    return done


def notes_of(trace: Trace, fold: SpanFold, options: ExportOptions) -> list[str]:
    """What the user may not expect."""
    said = []
    if fold.num_unsampled:
        said.append(
            f"{fold.num_unsampled} requests were left out: their client, or a sampler, says so"
        )
    if fold.num_late:
        said.append(f"{fold.num_late} facts of workers came too late for their step")
    if options.tokens and not any(file.header.get("tokens") for file in trace.files):
        said.append("the trace has no token ids: they are recorded with --tokens")
    return said
