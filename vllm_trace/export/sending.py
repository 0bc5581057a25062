"""Sending spans: OpenTelemetry's own OTLP exporters, gRPC and HTTP, fed with bytes that are ready.

TLS, headers, compression, time-outs and retries are theirs, by the standard ``OTEL_EXPORTER_OTLP_*``
variables. Two things are added: what a receiver rejects of a batch (partial success) is read from
its answers, and the reason of a failure is kept.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import requests

# gRPC's own log says in more lines what our message says, and looks at this once, as it is imported.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

from opentelemetry.exporter.otlp.proto.grpc import trace_exporter as grpc_exporter
from opentelemetry.exporter.otlp.proto.http import trace_exporter as http_exporter
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.sdk.trace.export import SpanExportResult

from vllm_trace.errors import UsageError
from vllm_trace.export import ExportError
from vllm_trace.export.endpoint import Endpoint, check_files

SILENCED = ("opentelemetry.exporter", "opentelemetry.sdk", "urllib3")
"""Loggers that say the same as our message, in more lines."""


class Batch:
    """An export request that is encoded already; an exporter takes it for its list of spans."""

    def __init__(self, data: bytes, num_spans: int) -> None:
        self.data = data
        self.num_spans = num_spans
        self._message: Any = None

    def __len__(self) -> int:
        return self.num_spans

    def __iter__(self) -> Iterator[Any]:
        raise TypeError("these spans are bytes")

    @property
    def message(self) -> Any:
        if self._message is None:
            self._message = ExportTraceServiceRequest.FromString(self.data)
        return self._message


def _let_batches_through(exporter: Any) -> None:
    """Have the exporter's module take a ``Batch`` as encoded; everything else goes the usual way."""
    usual = exporter.encode_spans
    if not hasattr(usual, "usual"):

        def encode_spans(spans: Any) -> Any:
            return spans.message if type(spans) is Batch else usual(spans)

        encode_spans.usual = usual  # type: ignore[attr-defined]
        exporter.encode_spans = encode_spans


@dataclass
class Answers:
    """What a receiver said."""

    rejected: int = 0
    reason: str = ""
    foreign: str = ""
    """Why an answer is none of OTLP; empty when it is."""

    def take(self, response: Any) -> None:
        partial = response.partial_success
        self.rejected += partial.rejected_spans
        if partial.error_message:
            self.reason = partial.error_message

    def clear(self) -> None:
        self.rejected, self.reason, self.foreign = 0, "", ""


class _Stub:
    """The trace service's stub, with an ear on what comes back."""

    def __init__(self, stub: Any, answers: Answers) -> None:
        self._stub, self._answers = stub, answers

    def Export(self, *args: Any, **kwargs: Any) -> Any:
        import grpc

        try:
            response = self._stub.Export(*args, **kwargs)
        except grpc.RpcError as error:
            self._answers.reason = f"{error.code().name}: {error.details()}"
            raise
        self._answers.take(response)
        return response


class _GrpcExporter(grpc_exporter.OTLPSpanExporter):
    """The official exporter; its stub is ours, also when it connects anew."""

    def __init__(self, answers: Answers, **options: Any) -> None:
        self._answers = answers
        super().__init__(**options)

    @property
    def _client(self) -> Any:
        return self.__dict__.get("_wrapped")

    @_client.setter
    def _client(self, stub: Any) -> None:
        self.__dict__["_wrapped"] = None if stub is None else _Stub(stub, self._answers)


class _Session(requests.Session):
    """A session with an ear on what comes back."""

    def __init__(self, answers: Answers) -> None:
        super().__init__()
        self.answers = answers

    def request(self, *args: Any, **kwargs: Any) -> requests.Response:
        if self.verify is not True:
            # OTEL_EXPORTER_OTLP_CERTIFICATE; else requests lets REQUESTS_CA_BUNDLE win.
            kwargs.setdefault("verify", self.verify)
        try:
            response = super().request(*args, **kwargs)
        except Exception as error:  # also of files, which are no errors of ``requests``
            self.answers.reason = f"{type(error).__name__}: {_innermost(error)}"[:300]
            raise
        kind = response.headers.get("content-type", "").partition(";")[0].strip()
        if not response.ok:
            said = "" if kind == "application/x-protobuf" else response.text[:200].strip()
            self.answers.reason = f"HTTP {response.status_code} {response.reason} {said}".strip()
        elif response.status_code >= 300:
            where = response.headers.get("location", "elsewhere")
            self.answers.foreign = f"HTTP {response.status_code}: it is at {where}"
        elif response.content and kind not in ("application/x-protobuf", "application/json"):
            self.answers.foreign = f"the answer was {kind or 'of no type'}, not OTLP"
        elif response.content and kind == "application/x-protobuf":
            try:
                self.answers.take(ExportTraceServiceResponse.FromString(response.content))
            except Exception:
                self.answers.foreign = "the answer cannot be read as OTLP"
        return response


def _innermost(error: Exception) -> str:
    """What happened, without the pools and retries that it happened in."""
    inner: Any = error
    while inner.args and isinstance(getattr(inner.args[0], "reason", inner.args[0]), Exception):
        inner = getattr(inner.args[0], "reason", inner.args[0])
    own = () if isinstance(inner, OSError) else inner.args
    texts = [part for part in own if isinstance(part, str)]
    said = re.sub(r"^HTTPS?Connection(Pool)?\(.*?\): ", "", texts[-1] if texts else str(inner))
    said = re.sub(r" \((read|connect) timeout=.*?\)", "", said)  # each time another number
    return "no answer of HTTP" if "BadStatusLine" in repr(error) else said


HINTS = {
    "Failed parsing HTTP/2": "It does not speak gRPC. For HTTP: OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf",
    "no answer of HTTP": "It does not speak HTTP. For gRPC: OTEL_EXPORTER_OTLP_PROTOCOL=grpc",
    "WRONG_VERSION_NUMBER": "It does not speak TLS: is its URL http://…?",
    "Socket closed": "Does it want TLS (https://…)?",
    "CERTIFICATE_VERIFY_FAILED": "OTEL_EXPORTER_OTLP_CERTIFICATE names the file of who vouches for it",
    "UNAUTHENTICATED": "OTEL_EXPORTER_OTLP_HEADERS says who you are: authorization=Bearer%20…",
    "PERMISSION_DENIED": "OTEL_EXPORTER_OTLP_HEADERS says who you are: authorization=Bearer%20…",
    "HTTP 401": "OTEL_EXPORTER_OTLP_HEADERS says who you are: authorization=Bearer%20…",
    "HTTP 403": "OTEL_EXPORTER_OTLP_HEADERS says who you are: authorization=Bearer%20…",
}
"""Words of a reason → what to do."""


MAX_REASONS = 8
"""That are told apart: a receiver may say something else each time."""

MAX_REASON = 300
"""Characters of one."""


@dataclass
class Delivered:
    """How many spans went where."""

    sent: int = 0
    dropped: int = 0
    """Not sent, or not accepted."""
    rejected: int = 0
    """Of the sent ones, what the receiver said it did not take; part of ``dropped``."""
    reasons: dict[str, int] = field(default_factory=dict)
    """Why, with the number of spans."""

    def drop(self, count: int, reason: str) -> None:
        if count:
            self.dropped += count
            reason = reason[:MAX_REASON]
            if reason not in self.reasons and len(self.reasons) >= MAX_REASONS:
                reason = "other reasons"
            self.reasons[reason] = self.reasons.get(reason, 0) + count

    @property
    def text(self) -> str:
        """Why spans were dropped."""
        return "; ".join(f"{count} × {reason}" for reason, count in self.reasons.items())


class Sender:
    """One receiver. ``send`` waits until a batch is taken or given up.

    Raises: ``UsageError`` for a setting that the exporter does not take.
    """

    def __init__(self, endpoint: Endpoint, environ: Mapping[str, str] = os.environ) -> None:
        check_files(environ)
        self.endpoint = endpoint
        self.answers = Answers()
        for name in SILENCED:
            logging.getLogger(name).setLevel(logging.CRITICAL)
        try:
            self._exporter = self._make()
        except Exception as error:
            raise UsageError(
                f"OpenTelemetry's exporter does not take its settings: {error}",
                hint="See the variables OTEL_EXPORTER_OTLP_*",
            ) from error

    def _make(self) -> Any:
        if self.endpoint.protocol == "grpc":
            _let_batches_through(grpc_exporter)
            return _GrpcExporter(self.answers, endpoint=self.endpoint.url)
        _let_batches_through(http_exporter)
        session = _Session(self.answers)
        return http_exporter.OTLPSpanExporter(endpoint=self.endpoint.url, session=session)

    def send(self, batch: Batch, delivered: Delivered) -> bool:
        """Send and count one batch. False when the receiver did not take it."""
        answers = self.answers
        answers.clear()
        try:
            result = self._exporter.export(batch)
        except Exception as error:
            result, answers.reason = SpanExportResult.FAILURE, f"{type(error).__name__}: {error}"
        if result is not SpanExportResult.SUCCESS or answers.foreign:
            delivered.drop(
                batch.num_spans, answers.foreign or answers.reason or "no answer in time"
            )
            return False
        rejected = min(answers.rejected, batch.num_spans)
        delivered.sent += batch.num_spans - rejected
        delivered.rejected += rejected
        delivered.drop(rejected, f"rejected: {answers.reason or 'no reason given'}")
        return True

    def close(self) -> None:
        self._exporter.shutdown()


def undelivered(delivered: Delivered, url: str) -> ExportError:
    """The error when nothing at all arrived."""
    hint = "Is the receiver there, and is this its OTLP port (4317 gRPC, 4318 HTTP)?"
    for words, better in HINTS.items():
        if words in delivered.text:
            hint = better
    return ExportError(f"nothing was delivered to {url}: {delivered.text}", hint=hint)
