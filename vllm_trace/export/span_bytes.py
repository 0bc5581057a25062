"""The parts of spans as bytes of OTLP protobuf: attributes, events and links, made straight from values.

An attribute is bytes that were made before, or a head that was, and a number. ``batcher`` puts the
parts together.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from operator import getitem
from typing import Any

from vllm_trace.export.forms import ALLOCATE, ENGINE_STEP
from vllm_trace.export.span import U64, Form, Link, SpanEvent
from vllm_trace.export.step_log import LogEvents
from vllm_trace.export.wire import SMALL, any_value, field, number

TRACE_ID, SPAN_ID, PARENT_ID, END = b"\x0a\x10", b"\x12\x08", b"\x22\x08", 0x41
_SAMPLED, _HAS_IS_REMOTE, _IS_REMOTE = 0x1, 0x100, 0x300


def _flags(flags: int) -> bytes:
    """The field of the flags, and the tag of the start that comes after it."""
    return b"\x85\x01" + (flags | _SAMPLED).to_bytes(4, "little") + b"\x39"


LOCAL, REMOTE = _flags(_HAS_IS_REMOTE), _flags(_IS_REMOTE)
CHILD, ROOT = "2s16s2s8s2s8s7sqBq", "2s16s2s8s7sqBq"
"""Ids, flags and times, in fixed places."""

_EVENT_TIME = struct.Struct("<BQ")
_LINK = struct.Struct("<4s16s2s8sBI")
_LINK_HEAD = bytes([0x6A, _LINK.size - 2, 0x0A, 16])
_LINK_FLAGS = 0x35

# Attributes -------------------------------------------------------------------------------

MAX_KNOWN = 1 << 13
"""Values of a name that are remembered."""

value_of: Callable[[Any, Any], bytes] = getitem
"""(what makes bytes of a value, the value) → the bytes."""

LARGEST_KNOWN = 1 << 20
"""Larger numbers are times, of which none comes again."""

LONGEST_NUMBER = 10
"""Bytes."""


class _Elements(dict[Any, bytes]):
    """Number or text → an element of a list: block ids come again and again."""

    def __missing__(self, value: Any) -> bytes:
        if len(self) >= 8 * MAX_KNOWN:
            self.clear()
        made = self[value] = field(0x0A, any_value(value))
        return made


_element = _Elements().__getitem__


class Values(dict[Any, bytes]):
    """Value of one attribute → the whole field of a repeated ``KeyValue``; of None, nothing.

    A name has values of one type only. Lists are tuples, so that they can be a key.
    """

    def __init__(self, tag: int, name: str) -> None:
        super().__init__({None: b""})
        self._tag, self._key = tag, field(0x0A, name.encode())
        self._numbers = [
            self._field(b"\x18" + bytes(size))[:-size] for size in range(1, LONGEST_NUMBER + 1)
        ]
        self._lists: dict[int, bytes] = {}

    def _field(self, value: bytes) -> bytes:
        return field(self._tag, self._key + field(0x12, value))

    def __missing__(self, value: Any) -> bytes:
        kind = type(value)
        if kind is int:
            body = number(value)
            made = self.number_head(len(body)) + body
            if value > LARGEST_KNOWN:
                return made
        elif kind is tuple:
            body = b"".join(map(_element, value))
            made = self.list_head(len(body)) + body
            if len(value) > 1:
                return made  # hardly ever the same again
        else:
            made = self._field(any_value(value))
        if len(self) > MAX_KNOWN:
            self.clear()
            self[None] = b""
        self[value] = made
        return made

    def number_head(self, size: int) -> bytes:
        """All that stands before a number of so many bytes."""
        return self._numbers[size - 1]

    def list_head(self, size: int) -> bytes:
        """All that stands before a list of so many bytes."""
        head = self._lists.get(size)
        if head is None:
            whole = self._field(field(0x2A, bytes(size)))
            head = whole[: len(whole) - size]
            if len(self._lists) < MAX_KNOWN:
                self._lists[size] = head
        return head


class Together(dict[tuple[Any, ...], bytes]):
    """Values of attributes that come together → the fields of all of them."""

    def __init__(self, values: tuple[Values, ...]) -> None:
        super().__init__()
        self._values = values

    def __missing__(self, values: tuple[Any, ...]) -> bytes:
        if len(self) >= MAX_KNOWN:
            self.clear()
        made = self[values] = b"".join(map(value_of, self._values, values))
        return made


class _Names(dict[str, Values]):
    """Name of an attribute → its values."""

    def __init__(self, tag: int) -> None:
        super().__init__()
        self.tag = tag

    def __missing__(self, name: str) -> Values:
        made = self[name] = Values(self.tag, name)
        return made


_OF_SPAN, _OF_EVENT = _Names(0x4A), _Names(0x1A)


def wire_of(form: Form) -> tuple[bytes, tuple[dict[Any, bytes], ...], Start | None]:
    """(name and kind of such a span, what makes bytes of each of its values, a quicker way for most)."""
    name = field(0x2A, form.name.encode()) + b"\x30" + number(form.kind)
    form.wire = name, _tables_of(form, _OF_SPAN), _STARTS.get(form)
    return form.wire


def _event_wire_of(form: Form) -> tuple[bytes, tuple[dict[Any, bytes], ...]]:
    """The same of an event."""
    form.wire = field(0x12, form.name.encode()), _tables_of(form, _OF_EVENT)
    return form.wire


def _tables_of(form: Form, names: _Names) -> tuple[dict[Any, bytes], ...]:
    return tuple(
        names[key] if isinstance(key, str) else Together(tuple([names[one] for one in key]))
        for key in form.keys
    )


# Events and links --------------------------------------------------------------------------


def event(one: SpanEvent) -> bytes:
    """``Span.Event`` as a field of the span."""
    name, tables = one.form.wire or _event_wire_of(one.form)
    time = _EVENT_TIME.pack(0x09, one.at_ns & U64)
    body = b"".join([time, name, *map(value_of, tables, one.values)])
    made = one.wire = b"\x5a" + number(len(body)) + body
    return made


def link(one: Link) -> bytes:
    """``Span.Link`` as a field of the span."""
    made = one.wire = _LINK.pack(
        _LINK_HEAD, one.trace_id, SPAN_ID, one.span_id, _LINK_FLAGS, _HAS_IS_REMOTE | _SAMPLED
    )
    return made


def more(events: Sequence[SpanEvent], links: Sequence[Link], error: str, dropped: int) -> bytes:
    """What few spans have, as fields of the span."""
    parts: list[bytes | bytearray]
    if type(events) is LogEvents:
        parts = events.joined(event)
    else:
        parts = [one.wire or event(one) for one in events]
    if dropped:
        parts.append(b"\x60" + number(dropped))
    parts += [one.wire or link(one) for one in links]
    if error:
        # ``Status`` with code ERROR.
        parts.append(field(0x7A, field(0x12, error.encode("utf-8", "replace")) + b"\x18\x02"))
    return b"".join(parts)


# The most common spans --------------------------------------------------------------------

Start = Callable[[bytes, bytes, bytes, int, int, tuple[Any, ...]], bytes]
"""Ids of trace, span and parent, times, values → the span to its last attribute; nothing when it cannot.

Raises: ``struct.error`` for times that no clock shows.
"""


class _Packers(dict[tuple[int, ...], tuple[Any, ...]]):
    """Sizes of a span's numbers → what packs ids, times and numbers, and the texts before the numbers."""

    def __init__(self, fixed: str, texts: Callable[[tuple[int, ...]], list[bytes]]) -> None:
        super().__init__()
        self._fixed, self._texts = fixed, texts

    def __missing__(self, sizes: tuple[int, ...]) -> tuple[Any, ...]:
        texts = self._texts(sizes)
        tail = "".join([f"{len(text)}s{size}s" for text, size in zip(texts, sizes)])
        made = self[sizes] = (struct.Struct(f"<{self._fixed}{tail}").pack, *texts)
        return made


def _one_block_texts(sizes: tuple[int, ...]) -> list[bytes]:
    count, blocks, after, before = (_OF_SPAN[str(key)] for key in ALLOCATE.keys[:4])
    element = b"\x0a" + number(sizes[0] + 1) + b"\x18"
    known = wire_of(ALLOCATE)[0] + count[1]
    return [
        known + blocks.list_head(len(element) + sizes[0]) + element,
        after.number_head(sizes[1]),
        before.number_head(sizes[2]),
    ]


def _step_texts(sizes: tuple[int, ...]) -> list[bytes]:
    step, free = (_OF_SPAN[str(key)] for key in ENGINE_STEP.keys[:2])
    return [wire_of(ENGINE_STEP)[0] + step.number_head(sizes[0]), free.number_head(sizes[1])]


_one_block, _step = _Packers(CHILD, _one_block_texts), _Packers(ROOT, _step_texts)


def start_allocate(
    trace_id: bytes, span_id: bytes, parent_id: bytes, start: int, end: int, values: tuple[Any, ...]
) -> bytes:
    """Of one block: a running request gets one as often as it fills one."""
    if len(values) != 4 or values[0] != 1 or values[3] is None:
        return b""
    _, (block,), after, before = values
    if 0 <= block < 1 << 14 > after >= 0 <= before < 1 << 14:
        block, after, before = SMALL[block], SMALL[after], SMALL[before]
    else:
        block, after, before = number(block), number(after), number(before)
    pack, first, second, third = _one_block[len(block), len(after), len(before)]
    return pack(
        TRACE_ID, trace_id, SPAN_ID, span_id, PARENT_ID, parent_id, LOCAL, start, END, end,
        first, block, second, after, third, before,
    )  # fmt: skip


def start_engine_step(
    trace_id: bytes, span_id: bytes, parent_id: bytes, start: int, end: int, values: tuple[Any, ...]
) -> bytes:
    """The root of a step, as long as its plan is known."""
    if values[1] is None:
        return b""
    step, free = number(values[0]), number(values[1])
    pack, first, second = _step[len(step), len(free)]
    head = pack(
        TRACE_ID, trace_id, SPAN_ID, span_id, LOCAL, start, END, end, first, step, second, free
    )
    return b"".join([head, *map(value_of, ENGINE_STEP.wire[1][2:], values[2:])])


_STARTS: dict[Form, Start] = {ALLOCATE: start_allocate, ENGINE_STEP: start_engine_step}
