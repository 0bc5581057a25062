"""Sending over real gRPC and HTTP: what the standard variables say, and receivers that misbehave."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import grpc
import pytest
from helpers import run_cli

from export.receiver import (
    RECEIVERS,
    Inbox,
    assert_trees,
    closed_port,
    grpc_receiver,
    half_open,
    http_receiver,
    make_certificate,
    values,
)
from vllm_trace.cli import main
from vllm_trace.errors import UsageError
from vllm_trace.export import ExportError, ExportOptions, attributes, export, sending
from vllm_trace.export.endpoint import Endpoint, endpoint_of, sampler_of
from vllm_trace.export.otlp import GIVE_UP
from vllm_trace.export.span import Traceparent
from vllm_trace.export.spans import spans
from vllm_trace.trace import read_trace

GOLD = Path(__file__).resolve().parent.parent / "gold"
PROTOCOLS = pytest.mark.parametrize("protocol", list(RECEIVERS))


@pytest.fixture(autouse=True)
def no_settings(monkeypatch):
    """A developer's own OTEL_* must not decide what the tests see."""
    import os

    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def send(url: str, name: str = "hello", **options):
    return export(read_trace(GOLD / f"{name}.vtrace"), "otlp", url, ExportOptions(**options))


def ids_of(name: str) -> Counter[bytes]:
    return Counter(span.span_id for span in spans(read_trace(GOLD / f"{name}.vtrace")))


@PROTOCOLS
def test_every_span_arrives_once(protocol, monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", protocol)
    inbox = Inbox()
    with RECEIVERS[protocol](inbox) as url:
        done = send(url, "mixed")
    assert ids_of("mixed") == Counter(span.span_id for span, _ in inbox.spans)
    assert {"spans": 4762, "requests": 200} == done.counts and [] == done.problems
    assert len(inbox.requests) >= 4762 // 512
    assert_trees([span for span, _ in inbox.spans])


def test_the_resource_is_the_process(monkeypatch):
    inbox = Inbox()
    with grpc_receiver(inbox) as url:
        send(url)
    header = read_trace(GOLD / "hello.vtrace").header
    facts = inbox.spans[-1][1]
    assert ("vllm", "0.32.0", header["host"], header["pid"], 0, "main") == (
        facts["service.name"], facts["service.version"], facts["host.name"], facts["process.pid"],
        facts["vllm_trace.rank"], facts["vllm_trace.role"],
    )  # fmt: skip
    assert facts["vllm_trace.model"].startswith("tiny-opt")
    assert set(facts) <= attributes.ATTRIBUTES.keys()


def test_names_of_the_service_are_the_users(monkeypatch):
    monkeypatch.setenv("OTEL_SERVICE_NAME", "my-vllm")
    monkeypatch.setenv(
        "OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=lab,host.name=other"
    )
    inbox = Inbox()
    with grpc_receiver(inbox) as url:
        send(url)
    facts = inbox.spans[0][1]
    assert ("my-vllm", "lab", "other") == (
        facts["service.name"], facts["deployment.environment.name"], facts["host.name"],
    )  # fmt: skip


@PROTOCOLS
def test_headers_and_compression(protocol, monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", protocol)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "authorization=Bearer%20abc,x-team=kv")
    inbox = Inbox()
    with RECEIVERS[protocol](inbox) as url:
        send(url)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip")
        send(url)
    plain, packed = inbox.headers[0], inbox.headers[-1]
    assert ("Bearer abc", "kv") == (plain["authorization"], plain["x-team"])
    if protocol == "grpc":
        # The library takes grpc-encoding out before the service sees it; it decoded the body.
        assert inbox.requests[0] == inbox.requests[-1]
    else:
        assert "gzip" == packed["content-encoding"] and "content-encoding" not in plain
        assert inbox.sizes[-1] < inbox.sizes[0] / 3


@PROTOCOLS
def test_what_a_receiver_rejects_is_counted(protocol, monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", protocol)
    inbox = Inbox()
    inbox.reject = 5
    with RECEIVERS[protocol](inbox) as url:
        done = send(url)
    total = sum(ids_of("hello").values())
    assert total - 5 == done.counts["spans"]
    assert ["5 spans were not delivered: 5 × rejected: too old"] == done.problems


@PROTOCOLS
def test_unavailable_is_tried_again(protocol, monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", protocol)
    inbox = Inbox()
    inbox.refusals = 1
    with RECEIVERS[protocol](inbox) as url:
        done = send(url)
    assert [] == done.problems and 2 == len(inbox.headers)
    assert ids_of("hello") == Counter(span.span_id for span, _ in inbox.spans)


@PROTOCOLS
def test_tls(protocol, tmp_path, monkeypatch):
    key, certificate = make_certificate(tmp_path)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", protocol)
    inbox = Inbox()
    with RECEIVERS[protocol](inbox, certificate=(key, certificate)) as url:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "2")
        with pytest.raises(ExportError, match="nothing was delivered"):
            send(url)  # nobody vouches for this certificate
        assert [] == inbox.requests
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_CERTIFICATE", str(certificate))
        assert [] == send(url).problems
    assert ids_of("hello") == Counter(span.span_id for span, _ in inbox.spans)


@PROTOCOLS
def test_nobody_listens(protocol, monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", protocol)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    with pytest.raises(ExportError, match="nothing was delivered") as caught:
        send(closed_port())
    assert "refused" in str(caught.value).lower()
    assert "4317" in caught.value.hint


@PROTOCOLS
def test_a_receiver_that_never_answers_is_given_up(protocol, monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", protocol)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "0.5")
    tried, usual = [], sending.Sender.send

    def counted(self, *words):
        tried.append(words)
        return usual(self, *words)

    monkeypatch.setattr(sending.Sender, "send", counted)
    with half_open() as url, pytest.raises(ExportError, match="nothing was delivered") as caught:
        send(url, "mixed")
    assert GIVE_UP == len(tried)  # of many more batches
    reasons = str(caught.value).partition("delivered to")[2].split("; ")
    assert 2 == len(reasons) and "given up" in reasons[1]  # each time the same, whatever the clock


def test_a_receiver_that_says_something_else_each_time_fills_no_memory():
    told = sending.Delivered()
    for number in range(1000):
        told.drop(2, f"request {number} refused: " + "x" * 10_000)
    told.drop(1, "request 0 refused: " + "x" * 10_000)
    assert 2001 == told.dropped == sum(told.reasons.values())
    assert sending.MAX_REASONS + 1 == len(told.reasons) and len(told.text) < 4000
    assert 2 * (1000 - sending.MAX_REASONS) == told.reasons["other reasons"]


@pytest.mark.parametrize(
    ("there", "asked", "said", "hint"),
    [
        ("grpc", "http/protobuf", "no answer of HTTP", "PROTOCOL=grpc"),
        ("http/protobuf", "grpc", "HTTP/2", "PROTOCOL=http/protobuf"),
        ("http/protobuf", "https", "WRONG_VERSION_NUMBER", "http://"),
    ],
)
def test_a_receiver_of_another_sort_is_named(there, asked, said, hint, monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", there if asked == "https" else asked)
    inbox = Inbox()
    with RECEIVERS[there](inbox) as url, pytest.raises(ExportError, match=said) as caught:
        send(url.replace("http:", "https:") if asked == "https" else url)
    assert hint in caught.value.hint
    assert "ConnectionPool" not in str(caught.value) and "\\x" not in str(caught.value)


@pytest.mark.parametrize("end", ["CERTIFICATE", "CLIENT_KEY", "CLIENT_CERTIFICATE"])
@PROTOCOLS
def test_a_certificate_that_cannot_be_read_is_said_before_anything_is_sent(
    protocol, end, monkeypatch, tmp_path
):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", protocol)
    monkeypatch.setenv(f"OTEL_EXPORTER_OTLP_{end}", str(tmp_path / "none.pem"))
    with pytest.raises(UsageError, match=f"OTEL_EXPORTER_OTLP_{end}=.*No such file"):
        send("https://127.0.0.1:4317")


@pytest.mark.parametrize(
    "words", ["127.0.0.1:4317", "localhost:4318", "[::1]:4317", "h:4318/v1/traces"]
)
def test_an_address_without_http_is_no_file(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="a receiver or a file") as caught:
        send(words)
    assert f"http://{words}" in caught.value.hint and [] == list(tmp_path.iterdir())


def test_a_receiver_that_refuses_is_not_asked_again(monkeypatch):
    inbox = Inbox()
    inbox.refuse = grpc.StatusCode.PERMISSION_DENIED
    with (
        grpc_receiver(inbox) as url,
        pytest.raises(ExportError, match="PERMISSION_DENIED: go away"),
    ):
        send(url, "mixed")


def test_the_wrong_page_and_the_wrong_program(monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "")
    inbox = Inbox()
    with http_receiver(inbox) as url:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/protobuf")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", f"{url}/traces")
        with pytest.raises(ExportError, match="404 Not Found no such page"):
            send("")


@pytest.mark.parametrize(
    ("code", "said"), [(200, "the answer was text/html, not OTLP"), (308, "HTTP 308: it is at")]
)
def test_an_answer_of_another_program_is_no_delivery(code, said, monkeypatch):
    """A web server that says 200 to everything: Jaeger's own page on port 16686, for one."""
    from export import receiver

    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")
    inbox = Inbox()
    usual = receiver._handler

    def handler(given):
        class Page(usual(given)):
            def do_POST(self):
                self.rfile.read(int(self.headers["content-length"]))
                self._answer(code, b"<html>", "text/html")

        return Page

    monkeypatch.setattr(receiver, "_handler", handler)
    with receiver.http_receiver(inbox) as url:
        with pytest.raises(ExportError, match=said):
            send(url)


def test_a_file_is_one_message(tmp_path):
    from opentelemetry.proto.trace.v1.trace_pb2 import TracesData

    out = tmp_path / "spans.binpb"
    assert 0 == main(["export", str(GOLD / "mixed.vtrace"), "--to", "otlp", "-o", str(out)])
    message = TracesData.FromString(out.read_bytes())
    found = [
        s for part in message.resource_spans for scope in part.scope_spans for s in scope.spans
    ]
    assert ids_of("mixed") == Counter(span.span_id for span in found)
    assert [out] == list(tmp_path.iterdir())
    assert "llm_request" in {span.name for span in found}
    assert {"vllm_trace"} == {
        scope.scope.name for part in message.resource_spans for scope in part.scope_spans
    }
    assert values(message.resource_spans[0].resource.attributes)["service.name"] == "vllm"


def test_the_command_tells_what_arrived(tmp_path):
    inbox = Inbox()
    with grpc_receiver(inbox) as url:
        done = run_cli(
            "export", GOLD / "prefix.vtrace", "--to", "otlp", "-o", url, "--json", cwd=tmp_path
        )
    assert 0 == done.returncode, done.stderr
    assert f"vllm-trace: wrote 863 spans, 100 requests to {url}\n" == done.stderr
    document = json.loads(done.stdout)
    assert (1, "otlp", url) == tuple(document[key] for key in ("schema", "format", "output"))
    assert {"spans": 863, "requests": 100} == document["counts"]


def test_the_exit_code_tells_what_was_lost(tmp_path, capsys, monkeypatch):
    inbox = Inbox()
    inbox.reject = 1
    with grpc_receiver(inbox) as url:
        assert 1 == main(["export", str(GOLD / "hello.vtrace"), "--to", "otlp", "-o", url])
    assert "1 span was not delivered" in capsys.readouterr().err
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    assert 2 == main(["export", str(GOLD / "hello.vtrace"), "--to", "otlp", "-o", closed_port()])
    assert "nothing was delivered" in capsys.readouterr().err


# Addresses --------------------------------------------------------------------------------

NAMES = {
    "P": "OTEL_EXPORTER_OTLP_PROTOCOL", "TP": "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL",
    "E": "OTEL_EXPORTER_OTLP_ENDPOINT", "TE": "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
}  # fmt: skip
HTTP = "http/protobuf"


@pytest.mark.parametrize(
    ("url", "environ", "expected"),
    [
        ("http://h:4317", {}, ("grpc", "http://h:4317")),
        ("http://h:4318", {}, (HTTP, "http://h:4318/v1/traces")),
        ("http://h:4318/v1/traces", {}, (HTTP, "http://h:4318/v1/traces")),
        ("https://h/otlp/", {}, (HTTP, "https://h/otlp/v1/traces")),
        ("https://h", {}, ("grpc", "https://h")),
        ("http://h:9", {"P": HTTP}, (HTTP, "http://h:9/v1/traces")),
        ("http://h:4318", {"P": "grpc"}, ("grpc", "http://h:4318")),
        ("http://h:4317", {"P": "grpc", "TP": HTTP}, (HTTP, "http://h:4317/v1/traces")),
        ("", {}, ("grpc", "http://localhost:4317")),
        ("", {"P": HTTP}, (HTTP, "http://localhost:4318/v1/traces")),
        ("", {"E": "http://h:4318"}, (HTTP, "http://h:4318/v1/traces")),
        ("", {"E": "http://h:4317", "TE": "http://t:4318/x"}, (HTTP, "http://t:4318/x")),
        ("http://[::1]:4317", {}, ("grpc", "http://[::1]:4317")),
    ],
)
def test_where_spans_go(url, environ, expected):
    assert Endpoint(*expected) == endpoint_of(url, {NAMES[k]: v for k, v in environ.items()})


@pytest.mark.parametrize("url", ["ftp://h:1", "http://", "http://h:x", "http://h:99999", "h:4317"])
def test_what_is_no_receiver(url):
    with pytest.raises(UsageError):
        endpoint_of(url, {})


def test_a_protocol_that_is_none_names_the_nearest():
    with pytest.raises(UsageError, match="did you mean 'http/protobuf'"):
        endpoint_of("http://h", {NAMES["P"]: "http/json"})


def test_samplers():
    half = sampler_of({"OTEL_TRACES_SAMPLER": "traceidratio", "OTEL_TRACES_SAMPLER_ARG": "0.5"})
    ids = [span.trace_id for span in spans(read_trace(GOLD / "mixed.vtrace"))]
    kept = sum(half(one, None) for one in {*ids}) / len({*ids})
    assert 0.4 < kept < 0.6
    no = Traceparent(b"\1" * 16, b"\1" * 8, False)
    assert not sampler_of({})(b"\1" * 16, no) and sampler_of({})(b"\1" * 16, None)
    off = sampler_of({"OTEL_TRACES_SAMPLER": "parentbased_always_off"})
    assert not off(b"\1" * 16, None) and off(b"\1" * 16, Traceparent(no.trace_id, no.span_id, True))
    for bad in ({"OTEL_TRACES_SAMPLER": "always"}, {"OTEL_TRACES_SAMPLER": "traceidratio",
                "OTEL_TRACES_SAMPLER_ARG": "2"}):  # fmt: skip
        with pytest.raises(UsageError):
            sampler_of(bad)
