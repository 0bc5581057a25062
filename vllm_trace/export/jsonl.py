"""JSON lines: an event a line, with its number and its process, for everything else.

``{"number": 7, "process": 0, "kind": "blocks.taken", "blocks": [1]}``. Hashes are whole 64-bit
numbers; a reader that has only floating-point numbers (jq before 1.7, JavaScript) rounds them. A
trace that is not whole ends with a line of the kind ``trace.incomplete`` that says why.
"""

from __future__ import annotations

from collections.abc import Iterator
from operator import attrgetter
from typing import Any, BinaryIO

import msgspec

from vllm_trace.events import EVENT_TYPES, Event
from vllm_trace.export import Exported, ExportOptions, exporter
from vllm_trace.trace import Trace

LINES = 1024
"""Lines that are encoded at once."""


def _line_of(cls: type[Event]) -> Any:
    """A struct with the fields of a line, in order, and a function that makes one of a record."""
    names = cls.__struct_fields__
    made = msgspec.defstruct(
        f"{cls.__name__}Line",
        [("number", int), ("process", int), ("kind", str), *((name, Any) for name in names)],
        gc=False,
    )
    if not names:
        return lambda number, process, event: made(number, process, cls.kind)
    values = attrgetter(*names)
    if len(names) == 1:
        return lambda number, process, event: made(number, process, cls.kind, values(event))
    return lambda number, process, event: made(number, process, cls.kind, *values(event))


_LINES = {cls: _line_of(cls) for cls in EVENT_TYPES}


@exporter("json", "JSON lines: an event a line", to="file", suffix=".jsonl")
def export(trace: Trace, out: BinaryIO, options: ExportOptions) -> Exported:
    """Write every event; the trace is read once."""
    encode = msgspec.json.Encoder().encode_lines
    count, held = 0, []
    for line in _lines(trace, options.tokens):
        held.append(line)
        if len(held) == LINES:
            out.write(encode(held))
            count += len(held)
            held.clear()
    out.write(encode(held))
    if trace.problems:
        out.write(encode([{"kind": "trace.incomplete", "problems": trace.problems}]))
    return Exported({"events": count + len(held)})


def _lines(trace: Trace, tokens: bool) -> Iterator[Any]:
    for number, process, event in trace.records():
        if not tokens and getattr(event, "token_ids", None) is not None:
            event.token_ids = None  # type: ignore[attr-defined]
        yield _LINES[type(event)](number, process, event)
