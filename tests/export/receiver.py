"""OTLP receivers for the tests: opentelemetry-proto's own service, over real gRPC and HTTP on loopback."""

from __future__ import annotations

import contextlib
import gzip
import socket
import ssl
import subprocess
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)

RETRY_CODES = {"unavailable": (grpc.StatusCode.UNAVAILABLE, 503)}


class Inbox:
    """What arrived, and how the receiver behaves."""

    def __init__(self) -> None:
        self.requests: list[Any] = []
        self.headers: list[dict[str, str]] = []
        self.sizes: list[int] = []
        """Bytes of each request on the wire, over HTTP."""
        self.refusals = 0
        """So many requests are answered UNAVAILABLE first."""
        self.reject = 0
        """Spans of each request that are not taken (partial success)."""
        self.refuse: Any = None
        """A gRPC status that every request gets."""
        self.delay = 0.0
        self.lock = threading.Lock()

    def take(self, request: Any, headers: dict[str, str]) -> bool:
        """Whether it is accepted."""
        with self.lock:
            self.headers.append(headers)
            if self.refusals:
                self.refusals -= 1
                return False
        time.sleep(self.delay)
        with self.lock:
            self.requests.append(request)
        return True

    def response(self) -> Any:
        made = ExportTraceServiceResponse()
        if self.reject:
            made.partial_success.rejected_spans = self.reject
            made.partial_success.error_message = "too old"
        return made

    @property
    def spans(self) -> list[Any]:
        """Every span with its resource's attributes."""
        with self.lock:
            return [
                (span, values(part.resource.attributes))
                for request in self.requests
                for part in request.resource_spans
                for scope in part.scope_spans
                for span in scope.spans
            ]


def value(any_value: Any) -> Any:
    kind = any_value.WhichOneof("value")
    if kind == "array_value":
        return [value(one) for one in any_value.array_value.values]
    return getattr(any_value, kind) if kind else None


def values(attributes: Any) -> dict[str, Any]:
    return {one.key: value(one.value) for one in attributes}


class _Service(TraceServiceServicer):
    def __init__(self, inbox: Inbox) -> None:
        self.inbox = inbox

    def Export(self, request: Any, context: Any) -> Any:
        headers = {key: str(text) for key, text in context.invocation_metadata()}
        if self.inbox.refuse is not None:
            context.abort(self.inbox.refuse, "go away")
        if not self.inbox.take(request, headers):
            context.abort(grpc.StatusCode.UNAVAILABLE, "come back")
        return self.inbox.response()


@contextlib.contextmanager
def grpc_receiver(
    inbox: Inbox, certificate: tuple[Path, Path] | None = None, port: int = 0
) -> Iterator[str]:
    """Yields its URL."""
    server = grpc.server(ThreadPoolExecutor(4))
    add_TraceServiceServicer_to_server(_Service(inbox), server)
    if certificate is None:
        port = server.add_insecure_port(f"127.0.0.1:{port}")
        scheme = "http"
    else:
        key, chain = (path.read_bytes() for path in certificate)
        port = server.add_secure_port(
            f"127.0.0.1:{port}", grpc.ssl_server_credentials([(key, chain)])
        )
        scheme = "https"
    server.start()
    try:
        yield f"{scheme}://127.0.0.1:{port}"
    finally:
        server.stop(0).wait()


def _handler(inbox: Inbox) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            inbox.sizes.append(len(body))
            if self.path != "/v1/traces":
                return self._answer(404, b"no such page", "text/plain")
            encoding = self.headers.get("content-encoding", "")
            plain = {"gzip": gzip.decompress, "deflate": zlib.decompress}.get(encoding, bytes)(body)
            headers = {key.lower(): text for key, text in self.headers.items()}
            if not inbox.take(ExportTraceServiceRequest.FromString(plain), headers):
                return self._answer(503, b"", "application/x-protobuf")
            self._answer(200, inbox.response().SerializeToString(), "application/x-protobuf")

        def _answer(self, code: int, body: bytes, kind: str) -> None:
            self.send_response(code)
            self.send_header("content-type", kind)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: Any) -> None:
            pass

    return Handler


@contextlib.contextmanager
def http_receiver(inbox: Inbox, certificate: tuple[Path, Path] | None = None) -> Iterator[str]:
    """Yields its URL, without the path."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(inbox))
    server.daemon_threads = True
    scheme = "http"
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate[1], certificate[0])
        server.socket = context.wrap_socket(server.socket, server_side=True)
        scheme = "https"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"{scheme}://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


RECEIVERS = {"grpc": grpc_receiver, "http/protobuf": http_receiver}


@contextlib.contextmanager
def half_open() -> Iterator[str]:
    """A port that takes connections and never says a word."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(16)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


def closed_port() -> str:
    """A URL where nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def make_certificate(folder: Path) -> tuple[Path, Path]:
    """(key, certificate) of 127.0.0.1, signed by itself."""
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    subprocess.run(
        [
            "openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
            "-keyout", str(key), "-out", str(certificate), "-subj", "/CN=127.0.0.1",
            "-addext", "subjectAltName=IP:127.0.0.1",
        ],
        check=True, capture_output=True,
    )  # fmt: skip
    return key, certificate


# Trees ------------------------------------------------------------------------------------


def assert_trees(spans: list[Any], remote: tuple[bytes, ...] = ()) -> dict[bytes, list[Any]]:
    """Ids are ids, every parent is there or the client's, children lie within their parent.

    Returns the spans of each trace.
    """
    ids = [span.span_id for span in spans]
    assert len(ids) == len(set(ids))
    by_id = {(span.trace_id, span.span_id): span for span in spans}
    traces: dict[bytes, list[Any]] = {}
    for span in spans:
        assert 16 == len(span.trace_id) and any(span.trace_id)
        assert 8 == len(span.span_id) and any(span.span_id)
        assert span.start_time_unix_nano <= span.end_time_unix_nano
        traces.setdefault(span.trace_id, []).append(span)
        for event in span.events:
            assert span.start_time_unix_nano <= event.time_unix_nano <= span.end_time_unix_nano
        times = [event.time_unix_nano for event in span.events]
        assert sorted(times) == times
        if span.parent_span_id and span.parent_span_id not in remote:
            parent = by_id[span.trace_id, span.parent_span_id]
            assert parent.start_time_unix_nano <= span.start_time_unix_nano, (parent, span)
            assert span.end_time_unix_nano <= parent.end_time_unix_nano, (parent, span)
    return traces
