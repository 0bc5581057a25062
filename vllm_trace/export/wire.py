"""The few words of protobuf's format that OTLP's spans need: numbers, fields, values, and a batch of spans.

A message object of Python's protobuf for each span, event and attribute costs several times what a
trace takes to read. The format is small: a field is a tag (number and kind), then a number or a
length and bytes. ``span_bytes`` makes the spans themselves.

Source: opentelemetry-proto 1.x, ``trace/v1/trace.proto``, ``common/v1/common.proto``.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import Any

from vllm_trace.export.span import U64, Resource

_DOUBLE = struct.Struct("<d")


def varint(value: int) -> bytes:
    """A number, seven bits a byte, the low ones first; negative ones as 64 bits."""
    value &= U64
    made = bytearray()
    while value > 0x7F:
        made.append(value & 0x7F | 0x80)
        value >>= 7
    made.append(value)
    return bytes(made)


SMALL = [varint(value) for value in range(1 << 14)]
"""The numbers that have one byte or two."""

_LOW = [bytes((low | 0x80, high | 0x80)) for high in range(1 << 7) for low in range(1 << 7)]
"""The lowest 14 bits of a longer number."""


def number(value: int) -> bytes:
    """``varint`` by tables, two bytes at a time."""
    if 0 <= value < 1 << 14:
        return SMALL[value]
    if 0 < value <= U64:
        return _LOW[value & 0x3FFF] + number(value >> 14)
    return varint(value)


def field(tag: int, body: bytes) -> bytes:
    """A field of bytes; ``tag`` is its number and kind in one byte."""
    return b"%c%b%b" % (tag, number(len(body)), body)


def any_value(value: Any) -> bytes:
    """``AnyValue``: the fields of a string, number, truth or list."""
    kind = type(value)
    if kind is str:
        return field(0x0A, value.encode("utf-8", "replace"))
    if kind is bool:
        return b"\x10\x01" if value else b"\x10\x00"
    if kind is int:
        return b"\x18" + number(value)
    if kind is float:
        return b"\x21" + _DOUBLE.pack(value)
    if kind is list or kind is tuple:
        return field(0x2A, b"".join([field(0x0A, any_value(one)) for one in value]))
    return field(0x0A, str(value).encode("utf-8", "replace"))


def key_value(tag: int, name: str, value: Any) -> bytes:
    """``KeyValue``: an attribute as a field of what it is of."""
    return field(tag, field(0x0A, name.encode()) + field(0x12, any_value(value)))


def resource_spans(
    resource: Resource, scope: tuple[str, str], spans: Sequence[bytes], extra: dict[str, Any]
) -> list[bytes]:
    """``ResourceSpans`` as a field of ``TracesData`` or of an export request, in pieces.

    ``extra`` comes over the resource's own attributes. Pieces, because these are the big ones:
    whoever puts them together copies them once.
    """
    facts = (resource.attributes | extra).items()
    described = field(0x0A, b"".join([key_value(0x0A, name, value) for name, value in facts]))
    name, version = scope
    head = field(0x0A, field(0x0A, name.encode()) + field(0x12, version.encode()))
    inner = len(head) + sum(map(len, spans))
    begin = b"\x12" + number(inner)
    outer = len(described) + len(begin) + inner
    return [b"\x0a" + number(outer), described, begin, head, *spans]


def request(parts: Iterable[list[bytes]]) -> bytes:
    """``ExportTraceServiceRequest`` of pieces; also ``TracesData``, which has the same form."""
    return b"".join([piece for part in parts for piece in part])
