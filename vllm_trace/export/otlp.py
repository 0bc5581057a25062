"""``--to otlp``: spans to a receiver, or into a file of protobuf (one ``TracesData`` message)."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator
from typing import Any

from vllm_trace.counting import counted, were
from vllm_trace.export import Exported, ExportOptions, _write, exporter
from vllm_trace.export.batcher import Batcher
from vllm_trace.export.endpoint import endpoint_of, is_url, sampler_of
from vllm_trace.export.spans import SpanFold, read
from vllm_trace.trace import Trace

GIVE_UP = 2
"""Batches in a row that a receiver did not take."""


def encoded(trace: Trace, fold: SpanFold) -> Iterator[tuple[bytes, int]]:
    """The trace's spans as export requests: (bytes, number of spans)."""
    batcher = Batcher()
    fold.emit = batcher.add
    with fewer_collections():
        for _ in read(trace, fold):
            if batcher.full:
                yield from batcher.take()
        batcher.cut()
        yield from batcher.take()


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
        dropped = f"{counted(delivered.dropped, 'spans')} {were(delivered.dropped)}"
        done.problems.append(f"{dropped} not delivered: {delivered.text}")
    return done


def notes_of(trace: Trace, fold: SpanFold, options: ExportOptions) -> list[str]:
    """What the user may not expect."""
    said = []
    if fold.num_unsampled:
        left_out = f"{counted(fold.num_unsampled, 'requests')} {were(fold.num_unsampled)} left out"
        said.append(f"{left_out}: the client, or a sampler, says so")
    if fold.num_late:
        said.append(f"{counted(fold.num_late, 'facts of workers')} came too late for their step")
    if options.tokens and not any(file.header.get("tokens") for file in trace.files):
        said.append("the trace has no token ids: they are recorded with --tokens")
    return said
