"""A span as plain values, its form and ids, and W3C's ``traceparent``. Nothing here knows OpenTelemetry's SDK."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b
from typing import Any

import msgspec

INTERNAL, SERVER = 1, 2
"""Kinds, numbered as in OTLP."""

U64 = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15


class Resource(msgspec.Struct, gc=False):
    """The process that a span is of."""

    attributes: dict[str, Any]


Together = tuple[str, ...]
"""Names of attributes whose values come together again and again: an encoder remembers them as one."""


class Form:
    """What spans, or span events, of one name have in common: kind, and the attributes that they can have."""

    __slots__ = ("keys", "kind", "name", "wire")

    def __init__(self, name: str, *keys: str | Together, kind: int = INTERNAL) -> None:
        self.name, self.keys, self.kind = name, keys, kind
        self.wire: Any = None
        """Left to the encoder: what it knows of this form."""

    def attributes(self, values: tuple[Any, ...]) -> dict[str, Any]:
        """Values in the order of ``keys`` by name. None stands for none, and so does a missing end."""
        made: dict[str, Any] = {}
        for key, value in zip(self.keys, values):
            pairs = [(key, value)] if isinstance(key, str) else zip(key, value)
            made |= {name: one for name, one in pairs if one is not None}
        return made


class SpanEvent(msgspec.Struct, gc=False):
    """A moment in a span. Spans of several requests share those of a step."""

    form: Form
    at_ns: int
    values: tuple[Any, ...] = ()
    """Of its attributes, as the form has them."""
    wire: bytes | None = None
    """Left to the encoder: what it made of this event."""

    @property
    def name(self) -> str:
        return self.form.name

    @property
    def attributes(self) -> dict[str, Any]:
        return self.form.attributes(self.values)


class Link(msgspec.Struct, gc=False):
    """A pointer to a span of another trace."""

    trace_id: bytes
    span_id: bytes
    wire: bytes | None = None
    """Left to the encoder: what it made of this link."""


class Span(msgspec.Struct, gc=False):
    """One finished span. Times are Unix ns."""

    resource: Resource
    form: Form
    trace_id: bytes
    span_id: bytes
    parent_id: bytes
    """Empty for a root."""
    start_ns: int
    end_ns: int
    values: tuple[Any, ...] = ()
    """Of its attributes, as the form has them."""
    events: Sequence[SpanEvent] = ()
    links: Sequence[Link] = ()
    error: str = ""
    """Makes the status ERROR, with these words."""
    remote_parent: bool = False
    dropped_events: int = 0

    @property
    def name(self) -> str:
        return self.form.name

    @property
    def kind(self) -> int:
        return self.form.kind

    @property
    def attributes(self) -> dict[str, Any]:
        return self.form.attributes(self.values)


Emit = Callable[..., None]
"""Takes a finished span as the fields of ``Span``, in their order: most are bytes before they are an object."""


class Ids:
    """Span ids of one trace: a sequence that is the same in every export of it.

    Steps of the golden ratio: as good as random for whoever samples by ids, and no hash for each.
    """

    __slots__ = ("base", "next")

    def __init__(self, base: int) -> None:
        self.base = base
        self.next: Callable[[], bytes] = _following(base).__next__
        """The id at the next place, from 1 on."""

    def at(self, place: int) -> bytes:
        return id_of(self.base + place * GOLDEN)


def _following(last: int) -> Iterator[bytes]:
    while True:
        last = last + GOLDEN & U64
        yield (last or 1).to_bytes(8, "big")


def id_of(number: int) -> bytes:
    """The lowest 64 bits of a number; never all zeros, which would be no id."""
    return (number & U64 or 1).to_bytes(8, "big")


def hashed(*parts: Any, size: int = 16) -> bytes:
    """An id made from what identifies a thing; never all zeros, which would be no id."""
    text = "\0".join(map(str, parts)).encode("utf-8", "surrogatepass")
    made = blake2b(text, digest_size=size).digest()
    return made if any(made) else b"\x01" * size


class Traceparent(msgspec.Struct, frozen=True):
    """The client's span, as its ``traceparent`` header gave it."""

    trace_id: bytes
    span_id: bytes
    sampled: bool


_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")


def read_traceparent(text: str) -> Traceparent | None:
    """The header's ids; None when it is not what W3C Trace Context allows."""
    match = _TRACEPARENT.fullmatch(text.strip())
    if match is None or match[1] == "ff" or (match[1] == "00" and match[5]):
        return None
    trace_id, span_id = bytes.fromhex(match[2]), bytes.fromhex(match[3])
    if not any(trace_id) or not any(span_id):
        return None
    return Traceparent(trace_id, span_id, bool(int(match[4], 16) & 1))
