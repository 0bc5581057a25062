"""Spans as the bytes of OTLP protobuf, made straight from values.

A message object of Python's protobuf for each span, event and attribute costs several times what a
trace takes to read. The format is small: a field is a tag (number and kind), then a number or a
length and bytes. Tests parse the result with OpenTelemetry's own classes and compare it with what
the SDK's encoder makes of the same spans.

Source: opentelemetry-proto 1.x, ``trace/v1/trace.proto``, ``common/v1/common.proto``.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import Any

from vllm_trace.export.span import Link, Resource, Span, SpanEvent

_U64 = (1 << 64) - 1

# Span: ids, flags and times have fixed places; the rest follows them.
_CHILD = struct.Struct("<2s16s2s8s2s8s2sIBQBQ")
_ROOT = struct.Struct("<2s16s2s8s2sIBQBQ")
_TRACE_ID, _SPAN_ID, _PARENT_ID, _FLAGS = b"\x0a\x10", b"\x12\x08", b"\x22\x08", b"\x85\x01"
_START, _END = 0x39, 0x41
_HAS_IS_REMOTE, _IS_REMOTE = 0x100, 0x300
SAMPLED = 1

_EVENT_TIME = struct.Struct("<BQ")
_LINK = struct.Struct("<4s16s2s8sBI")
_LINK_HEAD = bytes([0x6A, _LINK.size - 2, 0x0A, 16])
_LINK_FLAGS = 0x35
_DOUBLE = struct.Struct("<d")


def varint(value: int) -> bytes:
    """A number, seven bits a byte, the low ones first; negative ones as 64 bits."""
    value &= _U64
    made = bytearray()
    while value > 0x7F:
        made.append(value & 0x7F | 0x80)
        value >>= 7
    made.append(value)
    return bytes(made)


_SMALL = [varint(value) for value in range(1 << 14)]


def number(value: int) -> bytes:
    """``varint``, from a table where it is small."""
    return _SMALL[value] if 0 <= value < 16384 else varint(value)


def field(tag: int, body: bytes) -> bytes:
    """A field of bytes; ``tag`` is its number and kind in one byte."""
    size = len(body)
    return b"%c%b%b" % (tag, _SMALL[size] if size < 16384 else varint(size), body)


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


class _Keys(dict[str, bytes]):
    """Name → the ``key`` field of a ``KeyValue``."""

    def __missing__(self, name: str) -> bytes:
        made = self[name] = field(0x0A, name.encode())
        return made


_KEYS = _Keys()
_MAX_KNOWN = 1 << 16


class _Attributes(dict[tuple[str, Any], bytes]):
    """(name, value) → the whole field of a repeated ``KeyValue``, made once.

    Most values are small numbers, the same few words, or one block; a name has values of one type
    only. Lists are tuples, so that they can be a key.
    """

    def __init__(self, tag: int) -> None:
        super().__init__()
        self.tag = tag
        self.of = self.__getitem__

    def __missing__(self, item: tuple[str, Any]) -> bytes:
        key, value = _KEYS[item[0]], item[1]
        kind = type(value)
        if kind is int and len(key) < 110:
            body = number(value)
            size = len(body) + 1
            made = b"%c%c%b\x12%c\x18%b" % (self.tag, len(key) + 2 + size, key, size, body)
        elif kind is tuple:
            made = field(self.tag, key + field(0x12, field(0x2A, _list(value))))
            if len(value) > 1:
                return made
        else:
            made = field(self.tag, key + field(0x12, any_value(value)))
        if len(self) > _MAX_KNOWN:
            self.clear()
        self[item] = made
        return made


_OF_SPAN, _OF_EVENT, _OF_RESOURCE = _Attributes(0x4A), _Attributes(0x1A), _Attributes(0x0A)
_span_attribute, _event_attribute = _OF_SPAN.of, _OF_EVENT.of

_ELEMENTS = [field(0x0A, b"\x18" + one) for one in _SMALL]
"""List elements that are small numbers: block ids."""


def _list(values: Sequence[Any]) -> bytes:
    if values and type(values[0]) is int and min(values) >= 0 and max(values) < len(_ELEMENTS):
        return b"".join([_ELEMENTS[value] for value in values])
    return b"".join([field(0x0A, any_value(value)) for value in values])


def event(one: SpanEvent) -> bytes:
    """``Span.Event`` as a field of the span."""
    body = b"".join(
        [
            _EVENT_TIME.pack(0x09, one.at_ns & _U64),
            field(0x12, one.name.encode()),
            *map(_event_attribute, one.attributes.items()),
        ]
    )
    made = one.wire = field(0x5A, body)
    return made


def link(one: Link) -> bytes:
    """``Span.Link`` as a field of the span."""
    return _LINK.pack(
        _LINK_HEAD, one.trace_id, _SPAN_ID, one.span_id, _LINK_FLAGS, _HAS_IS_REMOTE | SAMPLED
    )


class _Names(dict[tuple[str, int], bytes]):
    """(name, kind) of a span → both fields."""

    def __missing__(self, key: tuple[str, int]) -> bytes:
        name, kind = key
        made = self[key] = field(0x2A, name.encode()) + b"\x30" + number(kind)
        return made


_NAMES = _Names()


def span(one: Span) -> bytes:
    """``Span`` as a field of ``ScopeSpans``."""
    if one.parent_id:
        flags = (_IS_REMOTE if one.remote_parent else _HAS_IS_REMOTE) | SAMPLED
        head = _CHILD.pack(
            _TRACE_ID, one.trace_id, _SPAN_ID, one.span_id, _PARENT_ID, one.parent_id,
            _FLAGS, flags, _START, one.start_ns & _U64, _END, one.end_ns & _U64,
        )  # fmt: skip
    else:
        head = _ROOT.pack(
            _TRACE_ID, one.trace_id, _SPAN_ID, one.span_id,
            _FLAGS, _HAS_IS_REMOTE | SAMPLED, _START, one.start_ns & _U64, _END, one.end_ns & _U64,
        )  # fmt: skip
    parts = [head, _NAMES[one.name, one.kind], *map(_span_attribute, one.attributes.items())]
    if one.events:
        parts += [each.wire or event(each) for each in one.events]
    if one.dropped_events:
        parts.append(b"\x60" + number(one.dropped_events))
    if one.links:
        parts += [link(each) for each in one.links]
    if one.error:
        parts.append(field(0x7A, field(0x12, one.error.encode("utf-8", "replace")) + b"\x18\x02"))
    if one.events:
        # These are long: put together once.
        return b"".join([b"\x12", number(sum(map(len, parts))), *parts])
    body = b"".join(parts)
    size = len(body)
    return b"\x12" + (_SMALL[size] if size < 16384 else varint(size)) + body


def resource_spans(
    resource: Resource, scope: tuple[str, str], spans: Sequence[bytes], extra: dict[str, Any]
) -> list[bytes]:
    """``ResourceSpans`` as a field of ``TracesData`` or of an export request, in pieces.

    ``extra`` comes over the resource's own attributes. Pieces, because these are the big ones:
    whoever puts them together copies them once.
    """
    described = field(0x0A, b"".join(map(_OF_RESOURCE.of, (resource.attributes | extra).items())))
    name, version = scope
    head = field(0x0A, field(0x0A, name.encode()) + field(0x12, version.encode()))
    inner = len(head) + sum(map(len, spans))
    begin = b"\x12" + number(inner)
    outer = len(described) + len(begin) + inner
    return [b"\x0a" + number(outer), described, begin, head, *spans]


def request(parts: Iterable[list[bytes]]) -> bytes:
    """``ExportTraceServiceRequest`` of pieces; also ``TracesData``, which has the same form."""
    return b"".join([piece for part in parts for piece in part])
