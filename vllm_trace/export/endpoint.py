"""Where spans go and how, from ``--otlp URL`` and OpenTelemetry's variables. Imports nothing heavy."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit, urlunsplit

from vllm_trace.errors import UsageError, unknown
from vllm_trace.export.span import Traceparent

PROTOCOLS = ("grpc", "http/protobuf")
GRPC_PORT, HTTP_PORT = 4317, 4318
TRACES_PATH = "/v1/traces"


@dataclass(frozen=True)
class Endpoint:
    """A receiver."""

    protocol: str
    """One of ``PROTOCOLS``."""
    url: str


_HOST_AND_PORT = re.compile(r"([\w.-]+|\[[0-9a-fA-F:]+\]):\d+(/v1/traces)?/?")


def is_url(text: str) -> bool:
    """Whether it is a receiver's address, and no file.

    Raises: ``UsageError`` for one without its beginning: nobody wants a file of that name.
    """
    if _HOST_AND_PORT.fullmatch(text):
        raise UsageError(
            f"{text!r} may be a receiver or a file",
            hint=f"A receiver is http://{text}, and a file ./{text}",
        )
    return "://" in text


FILES = ("CERTIFICATE", "CLIENT_KEY", "CLIENT_CERTIFICATE")
"""Ends of the variables that name files."""


def check_files(environ: Mapping[str, str] = os.environ) -> None:
    """The exporters go on without a certificate that they cannot read, and say nothing of it.

    Raises: ``UsageError`` for a file that cannot be read.
    """
    for end in FILES:
        name = f"OTEL_EXPORTER_OTLP_TRACES_{end}"
        if not environ.get(name):
            name = f"OTEL_EXPORTER_OTLP_{end}"
        if environ.get(name):
            try:
                open(environ[name], "rb").close()
            except OSError as error:
                raise UsageError(
                    f"{name}={environ[name]} cannot be read: {error.strerror}"
                ) from None


def endpoint_of(url: str, environ: Mapping[str, str] = os.environ) -> Endpoint:
    """Protocol and address of a URL; an empty one stands for what the variables say.

    The protocol is ``OTEL_EXPORTER_OTLP_TRACES_PROTOCOL``, ``OTEL_EXPORTER_OTLP_PROTOCOL``, or the
    port's (4317 gRPC, 4318 HTTP), or HTTP where the URL has a path, or gRPC.

    Raises: ``UsageError`` for a URL or a protocol that is none.
    """
    protocol = (
        environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL")
        or environ.get("OTEL_EXPORTER_OTLP_PROTOCOL")
        or ""
    ).strip()
    if protocol and protocol not in PROTOCOLS:
        raise unknown("OTLP protocol", protocol, PROTOCOLS)
    whole = ""
    if not url:
        whole = url = environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "")
    if not url:
        port = HTTP_PORT if protocol == "http/protobuf" else GRPC_PORT
        url = environ.get("OTEL_EXPORTER_OTLP_ENDPOINT") or f"http://localhost:{port}"
    try:
        parts = urlsplit(url)
        port = parts.port or 0
    except ValueError as error:
        raise UsageError(f"{url!r} is no URL: {error}") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError(f"{url!r} is no receiver", hint="For example http://127.0.0.1:4317")
    if not protocol:
        has_path = parts.path.strip("/") != ""
        http = port == HTTP_PORT or (port != GRPC_PORT and has_path)
        protocol = "http/protobuf" if http else "grpc"
    if protocol == "grpc":
        return Endpoint(protocol, f"{parts.scheme}://{parts.netloc}")
    path = parts.path if whole else parts.path.rstrip("/").removesuffix(TRACES_PATH) + TRACES_PATH
    return Endpoint(protocol, urlunsplit((parts.scheme, parts.netloc, path, parts.query, "")))


SAMPLERS = ("always_on", "always_off", "traceidratio")
PARENT_BASED = "parentbased_"


def sampler_of(
    environ: Mapping[str, str] = os.environ,
) -> Callable[[bytes, Traceparent | None], bool]:
    """``OTEL_TRACES_SAMPLER``: which traces are exported, by trace id and the client's decision.

    Raises: ``UsageError`` for a sampler or an argument that is none.
    """
    name = environ.get("OTEL_TRACES_SAMPLER", "").strip() or "parentbased_always_on"
    root = name.removeprefix(PARENT_BASED)
    if root not in SAMPLERS:
        raise unknown("sampler", name, [*SAMPLERS, *(PARENT_BASED + one for one in SAMPLERS)])
    text = environ.get("OTEL_TRACES_SAMPLER_ARG", "") or "1"
    try:
        rate = {"always_on": 1.0, "always_off": 0.0}.get(root)
        rate = float(text) if rate is None else rate
    except ValueError:
        rate = -1.0
    if not 0 <= rate <= 1:
        raise UsageError(f"OTEL_TRACES_SAMPLER_ARG={text!r} is not between 0 and 1")
    bound = round(rate * 2**64)
    by_parent = name.startswith(PARENT_BASED)

    def sampler(trace_id: bytes, parent: Traceparent | None) -> bool:
        if by_parent and parent is not None:
            return parent.sampled
        return int.from_bytes(trace_id[8:], "big") < bound

    return sampler
