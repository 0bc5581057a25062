"""``--to jaeger-json``: what Jaeger's page "upload JSON" takes.

Spans come in the order in which they finish and leave by trace: they wait in a temporary database,
so that memory does not grow with the trace.

Source: Jaeger's ``model/json/model.go`` (times in microseconds; parents are references).
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from typing import Any, BinaryIO

import msgspec

from vllm_trace.export import Exported, ExportOptions, exporter
from vllm_trace.export import attributes as a
from vllm_trace.export.span import SERVER, Resource, Span
from vllm_trace.export.spans import SpanFold, spans
from vllm_trace.trace import Trace

_encode = msgspec.json.encode

KINDS = {SERVER: "server"}


def tag(key: str, value: Any) -> dict[str, Any]:
    """An attribute; lists become text, as Jaeger's own converter makes them."""
    if isinstance(value, bool):
        return {"key": key, "type": "bool", "value": value}
    if isinstance(value, int):
        return {"key": key, "type": "int64", "value": value}
    if isinstance(value, float):
        return {"key": key, "type": "float64", "value": value}
    text = value if isinstance(value, str) else _encode(value).decode()
    return {"key": key, "type": "string", "value": text}


def tags(attributes: dict[str, Any]) -> list[dict[str, Any]]:
    return [tag(key, value) for key, value in attributes.items()]


def to_json(span: Span, process: str, inside: bool) -> dict[str, Any]:
    """One span. ``inside``: its parent is in the same file; another client's parent is not."""
    start, end = span.start_ns // 1000, span.end_ns // 1000
    extra = []
    if span.kind in KINDS:
        extra.append(tag("span.kind", KINDS[span.kind]))
    if span.error:
        extra += [
            tag("error", True),
            tag("otel.status_code", "ERROR"),
            tag("otel.status_description", span.error),
        ]
    references = [
        {"refType": "FOLLOWS_FROM", "traceID": link.trace_id.hex(), "spanID": link.span_id.hex()}
        for link in span.links
    ]
    if span.parent_id and inside:
        parent = {
            "refType": "CHILD_OF",
            "traceID": span.trace_id.hex(),
            "spanID": span.parent_id.hex(),
        }
        references.insert(0, parent)
    elif span.parent_id:
        extra.append(tag("vllm_trace.client_span", span.parent_id.hex()))
    return {
        "traceID": span.trace_id.hex(),
        "spanID": span.span_id.hex(),
        "operationName": span.name,
        "references": references,
        "startTime": start,
        "duration": end - start,
        "tags": tags(span.attributes) + extra,
        "logs": [
            {
                "timestamp": event.at_ns // 1000,
                "fields": [tag("event", event.name), *tags(event.attributes)],
            }
            for event in span.events
        ],
        "processID": process,
        "warnings": None,
    }


class _Spool:
    """Spans on their way from the order of time to the order of traces."""

    def __init__(self) -> None:
        # An empty name is a database in a temporary file that goes away with it.
        self._db = sqlite3.connect("", isolation_level=None)
        self._db.execute("create table spans (trace blob, number integer, process text, json blob)")
        self._db.execute("begin")
        self._count = 0

    def add(self, span: Span, process: str) -> None:
        self._count += 1
        body = _encode(to_json(span, process, not span.remote_parent))
        row = (span.trace_id, self._count, process, body)
        self._db.execute("insert into spans values (?, ?, ?, ?)", row)

    def traces(self) -> Iterator[tuple[bytes, list[str], list[bytes]]]:
        """(trace id, its processes, its spans) in the order in which traces began to finish."""
        self._db.execute("create index by_trace on spans (trace, number)")
        order = self._db.execute("select trace from spans group by trace order by min(number)")
        for (trace,) in order:
            rows = self._db.execute(
                "select process, json from spans where trace = ? order by number", (trace,)
            ).fetchall()
            yield trace, sorted({process for process, _ in rows}), [body for _, body in rows]

    def close(self) -> None:
        self._db.close()


class _Processes(dict[int, str]):
    """A resource → its name in the file."""

    def __init__(self) -> None:
        super().__init__()
        self.described: dict[str, dict[str, Any]] = {}
        self._kept: list[Resource] = []

    def of(self, resource: Resource) -> str:
        known = self.get(id(resource))
        if known is None:
            known = self[id(resource)] = f"p{len(self) + 1}"
            self._kept.append(resource)
            attributes = dict(resource.attributes)
            name = attributes.pop(a.SERVICE_NAME)
            self.described[known] = {"serviceName": name, "tags": tags(attributes)}
        return known


@exporter("jaeger-json", "Spans for Jaeger's page “upload JSON”", suffix=".json")
def export(trace: Trace, out: BinaryIO, options: ExportOptions) -> Exported:
    """Write every trace with its spans."""
    fold = SpanFold(detail=options.detail, tokens=options.tokens)
    spool, processes = _Spool(), _Processes()
    num_spans = num_traces = 0
    try:
        for span in spans(trace, fold):
            spool.add(span, processes.of(span.resource))
            num_spans += 1
        out.write(b'{"data":[')
        for trace_id, names, bodies in spool.traces():
            head = _encode({"traceID": trace_id.hex()}).rstrip(b"}")
            described = _encode({name: processes.described[name] for name in names})
            out.write(b"\n" if not num_traces else b",\n")
            out.write(head + b',"spans":[' + b",".join(bodies) + b"]")
            out.write(b',"processes":' + described + b',"warnings":null}')
            num_traces += 1
        out.write(b'\n],"total":0,"limit":0,"offset":0,"errors":null}\n')
    finally:
        spool.close()
    counts = {"spans": num_spans, "traces": num_traces, "requests": fold.num_requests}
    done = Exported(counts)
    if options.tokens and not any(file.header.get("tokens") for file in trace.files):
        done.notes.append("the trace has no token ids: they are recorded with --tokens")
    return done
