"""Jaeger's upload format: ids, parents, order; and the same against a real Jaeger where there is one."""

from __future__ import annotations

import io
import json
import os
import time
import urllib.request
from pathlib import Path

import pytest
import recorded

from export.span_trees import CLIENT, one_request
from vllm_trace.cli import main
from vllm_trace.export import ExportOptions, attributes, export, jaeger_json
from vllm_trace.export.spans import spans
from vllm_trace.trace import read_trace

GOLD = Path(__file__).resolve().parent.parent / "gold"
TRACES = sorted(path.stem for path in GOLD.glob("*.vtrace"))


def uploaded(path: Path, **options) -> dict:
    out = io.BytesIO()
    jaeger_json.export(read_trace(path), out, ExportOptions(**options))
    return json.loads(out.getvalue())


@pytest.mark.parametrize("name", TRACES)
def test_ids_parents_and_order(name):
    document = uploaded(GOLD / f"{name}.vtrace")
    found = list(spans(read_trace(GOLD / f"{name}.vtrace")))
    assert len({span.trace_id for span in found}) == len(document["data"])
    assert len(found) == sum(len(trace["spans"]) for trace in document["data"])
    assert document["errors"] is None
    for trace in document["data"]:
        assert trace["warnings"] is None and 32 == len(trace["traceID"])
        by_id = {span["spanID"]: span for span in trace["spans"]}
        assert len(by_id) == len(trace["spans"])
        roots = 0
        for span in trace["spans"]:
            assert trace["traceID"] == span["traceID"] and 16 == len(span["spanID"])
            assert span["processID"] in trace["processes"] and span["warnings"] is None
            assert span["duration"] >= 0
            end = span["startTime"] + span["duration"]
            parents = [ref for ref in span["references"] if ref["refType"] == "CHILD_OF"]
            roots += not parents
            for ref in parents:
                parent = by_id[ref["spanID"]]
                assert parent["startTime"] <= span["startTime"]
                assert end <= parent["startTime"] + parent["duration"]
            stamps = [log["timestamp"] for log in span["logs"]]
            assert sorted(stamps) == stamps
            assert all(span["startTime"] <= at <= end for at in stamps)
            for tag in span["tags"]:
                types = {"int64": int, "float64": float, "string": str, "bool": bool}
                assert type(tag["value"]) is types[tag["type"]]
        assert 1 == roots
        for process in trace["processes"].values():
            assert "vllm" == process["serviceName"]


def test_requests_that_share_the_clients_trace_are_one_trace(tmp_path):
    first, second = one_request(traceparent=CLIENT), one_request(traceparent=CLIENT)[1:]
    for event in second:
        if hasattr(event, "request"):
            event.request = 1
        for name in ("requests", "new"):
            if getattr(event, name, None):
                setattr(event, name, [1])
        if hasattr(event, "step"):
            event.step += 2
    document = uploaded(recorded.written(tmp_path, first + second))
    (shared,) = [one for one in document["data"] if one["traceID"] == CLIENT[3:35]]
    roots = [span for span in shared["spans"] if span["operationName"] == "llm_request"]
    assert 2 == len(roots)
    for root in roots:
        # The client's span is not in the file: a reference to it would be a warning.
        assert [] == root["references"]
        tags = {tag["key"]: tag["value"] for tag in root["tags"]}
        assert ("b7ad6b7169203331", "server") == (tags["vllm_trace.client_span"], tags["span.kind"])


def test_an_abort_is_an_error():
    document = uploaded(GOLD / "abort.vtrace")
    errors = [
        span for trace in document["data"] for span in trace["spans"]
        if {"key": "error", "type": "bool", "value": True} in span["tags"]
    ]  # fmt: skip
    assert errors and all(span["operationName"] == "llm_request" for span in errors)


def test_an_empty_trace_is_an_empty_document(tmp_path):
    assert [] == uploaded(recorded.written(tmp_path, [recorded.engine()]))["data"]


def test_the_command_writes_beside_the_trace(tmp_path, capsys):
    path = tmp_path / "hello.vtrace"
    path.write_bytes((GOLD / "hello.vtrace").read_bytes())
    assert 0 == main(["export", str(path), "--to", "jaeger-json"])
    made = json.loads((tmp_path / "hello.jaeger-json.json").read_text())
    assert 21 == len(made["data"])
    assert "wrote 148 spans, 21 traces, 1 request" in capsys.readouterr().err


JAEGER = os.environ.get("JAEGER_OTLP", ""), os.environ.get("JAEGER_QUERY", "")


@pytest.mark.skipif(
    not all(JAEGER),
    reason="no Jaeger: JAEGER_OTLP (http://host:4317) and JAEGER_QUERY (http://host:16686) name one",
)
def test_a_real_jaeger_gives_back_what_it_was_sent(monkeypatch):
    otlp, query = JAEGER
    monkeypatch.setenv("OTEL_SERVICE_NAME", f"vllm-trace-test-{time.time_ns()}")
    trace = read_trace(GOLD / "preempt.vtrace")
    assert [] == export(trace, "otlp", otlp).problems
    expected: dict[str, set[str]] = {}
    for span in spans(read_trace(GOLD / "preempt.vtrace")):
        expected.setdefault(span.trace_id.hex(), set()).add(span.span_id.hex())
    for trace_id, ids in expected.items():
        for _ in range(50):
            with urllib.request.urlopen(f"{query.rstrip('/')}/api/traces/{trace_id}") as answer:
                (found,) = json.load(answer)["data"]
            if len(found["spans"]) >= len(ids):
                break
            time.sleep(0.2)
        assert ids == {span["spanID"] for span in found["spans"]}
        assert not any(span["warnings"] for span in found["spans"])
        for span in found["spans"]:
            if span["operationName"] == "llm_request":
                tags = {tag["key"]: tag["value"] for tag in span["tags"]}
                assert 60 == tags[attributes.OUTPUT_TOKENS]
