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

from vllm_trace.export.span import INTERNAL, SERVER, Link, Resource, Span, SpanEvent

_U64 = (1 << 64) - 1

# Span: ids, flags and times have fixed places; the rest follows them.
_CHILD = struct.Struct("<2s16s2s8s2s8s7sQBQ")
_ROOT = struct.Struct("<2s16s2s8s7sQBQ")
_TRACE_ID, _SPAN_ID, _PARENT_ID, _FLAGS = b"\x0a\x10", b"\x12\x08", b"\x22\x08", b"\x85\x01"
_START, _END = b"\x39", 0x41
_HAS_IS_REMOTE, _IS_REMOTE = 0x100, 0x300
SAMPLED = 1


def _flags(flags: int) -> bytes:
    """The field of the flags, and the tag of the start that comes after it."""
    return _FLAGS + (flags | SAMPLED).to_bytes(4, "little") + _START


_LOCAL, _REMOTE = _flags(_HAS_IS_REMOTE), _flags(_IS_REMOTE)

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


class _Texts(dict[str, bytes]):
    """Text → the field that holds it: the few names that come again and again."""

    def __init__(self, tag: int) -> None:
        super().__init__()
        self.tag = tag

    def __missing__(self, text: str) -> bytes:
        made = self[text] = field(self.tag, text.encode())
        return made


_KEYS, _EVENT_NAMES = _Texts(0x0A), _Texts(0x12)
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
        self._heads: dict[tuple[str, int], bytes] = {}
        """(name, bytes of a number) → all that stands before the number."""

    def __missing__(self, item: tuple[str, Any]) -> bytes:
        name, value = item
        key = _KEYS[name]
        kind = type(value)
        if kind is int:
            body = number(value)
            head = self._heads.get((name, len(body)))
            if head is None:
                whole = field(self.tag, key + field(0x12, b"\x18" + body))
                head = self._heads[name, len(body)] = whole[: -len(body)]
            made = head + body
        elif kind is tuple:
            made = field(self.tag, key + field(0x12, field(0x2A, _list(value))))
            if len(value) > 1:
                return made  # hardly ever the same again
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
        return b"".join(map(_ELEMENTS.__getitem__, values))
    return b"".join([field(0x0A, any_value(value)) for value in values])


def event(one: SpanEvent) -> bytes:
    """``Span.Event`` as a field of the span."""
    head = _EVENT_TIME.pack(0x09, one.at_ns & _U64) + _EVENT_NAMES[one.name]
    body = head + b"".join(map(_event_attribute, one.attributes.items()))
    made = one.wire = b"\x5a" + number(len(body)) + body
    return made


def link(one: Link) -> bytes:
    """``Span.Link`` as a field of the span."""
    return _LINK.pack(
        _LINK_HEAD, one.trace_id, _SPAN_ID, one.span_id, _LINK_FLAGS, _HAS_IS_REMOTE | SAMPLED
    )


class _Names(dict[str, bytes]):
    """Name of a span of one kind → both fields."""

    def __init__(self, kind: int) -> None:
        super().__init__()
        self.kind = b"\x30" + number(kind)

    def __missing__(self, name: str) -> bytes:
        made = self[name] = field(0x2A, name.encode()) + self.kind
        return made


_NAMES = {kind: _Names(kind) for kind in (INTERNAL, SERVER)}


def span(one: Span) -> bytes:
    """``Span`` as a field of ``ScopeSpans``."""
    if one.parent_id:
        head = _CHILD.pack(
            _TRACE_ID, one.trace_id, _SPAN_ID, one.span_id, _PARENT_ID, one.parent_id,
            _REMOTE if one.remote_parent else _LOCAL, one.start_ns & _U64, _END, one.end_ns & _U64,
        )  # fmt: skip
    else:
        head = _ROOT.pack(
            _TRACE_ID, one.trace_id, _SPAN_ID, one.span_id,
            _LOCAL, one.start_ns & _U64, _END, one.end_ns & _U64,
        )  # fmt: skip
    parts = [head, _NAMES[one.kind][one.name], *map(_span_attribute, one.attributes.items())]
    if one.events or one.dropped_events:
        return _with_events(one, parts)
    if one.links:
        parts += map(link, one.links)
    if one.error:
        parts.append(_error(one.error))
    body = b"".join(parts)
    size = len(body)
    return b"\x12" + (_SMALL[size] if size < 16384 else varint(size)) + body


def _with_events(one: Span, parts: list[bytes]) -> bytes:
    """The same of a span that may be long: not copied to put its length before it."""
    parts.append(b"".join([each.wire or event(each) for each in one.events]))
    if one.dropped_events:
        parts.append(b"\x60" + number(one.dropped_events))
    parts += map(link, one.links)
    if one.error:
        parts.append(_error(one.error))
    return b"".join([b"\x12", number(sum(map(len, parts))), *parts])


def _error(words: str) -> bytes:
    """``Status`` with code ERROR as a field of the span."""
    return field(0x7A, field(0x12, words.encode("utf-8", "replace")) + b"\x18\x02")


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
