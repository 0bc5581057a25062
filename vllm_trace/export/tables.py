"""The tables of a trace: one for each kind of event, as Arrow schemas made from ``events.py``.

Every table of events begins with the same four columns, which place its rows in the trace:

``number``   position in the merged trace: the "event N" of every message
``process``  which file told it: a row of the table ``trace``
``step``     the step it belongs to: its own, or that of the next ``step.scheduled`` or
             ``step.updated`` of its process, inside which it happened
``at_ns``    when it began: its own time, or the next one that its process told

and goes on with the event's own fields. Hashes are unsigned, other numbers signed, 64 bits each;
what an event lacks is null, and columns that never are so say it. What has no shape of its own
(``settings``, ``sampling``) is JSON text.
"""

from __future__ import annotations

from typing import Any, Union, get_args, get_origin, get_type_hints

import msgspec
import pyarrow as pa

from vllm_trace.events import EVENT_TYPES, Event, KVGroup

PLACE = ("number", "process", "step", "at_ns")
"""What every row begins with."""

HASHES = ("block_hashes", "new_hashes", "hashes")
"""Fields that hold hashes: unsigned."""

TUPLES = {
    "candidates": ("backend", "rejected"),
    "events": ("what", "hashes"),
    "worst": ("absolute", "relative", "request", "position"),
}
"""Names for the parts of fields that are lists of tuples."""

INT, HASH, TEXT = pa.int64(), pa.uint64(), pa.string()


def table_name(kind: str) -> str:
    """``blocks.taken`` is the table ``blocks_taken``, in the file ``blocks_taken.parquet``."""
    return kind.replace(".", "_")


def arrow_type(name: str, hint: Any) -> pa.DataType:
    """The Arrow type of an event's field."""
    number = HASH if name in HASHES else INT
    plain = {int: number, str: TEXT, bool: pa.bool_(), float: pa.float64(), Any: TEXT}
    if hint in plain:
        return plain[hint]
    origin, inside = get_origin(hint), get_args(hint)
    if origin is list:
        return pa.list_(pa.field("item", arrow_type(name, inside[0]), nullable=False))
    if origin is tuple:
        return pa.struct([(part, arrow_type(part, of)) for part, of in zip(TUPLES[name], inside)])
    if origin is dict:
        key, value = inside
        return TEXT if value is Any else pa.map_(arrow_type("", key), arrow_type("", value))
    if hint is KVGroup:
        hints = get_type_hints(KVGroup)
        return pa.struct([(each, arrow_type(each, hints[each])) for each in hints])
    present = [each for each in inside if each is not type(None)]
    assert len(present) == 1 and origin in (Union, type(int | None)), (name, hint)
    return arrow_type(name, present[0])


def schema_of(cls: type[Event]) -> pa.Schema:
    """Columns of the table of a kind."""
    hints = get_type_hints(cls)
    own = [
        pa.field(name, arrow_type(name, hints[name]), nullable=may_lack(hints[name]))
        for name in cls.__struct_fields__
        if name not in PLACE
    ]
    return pa.schema(
        [pa.field(name, INT, nullable=name in ("step", "at_ns")) for name in PLACE] + own
    )


def may_lack(hint: Any) -> bool:
    """Whether an event may be without such a field."""
    return type(None) in get_args(hint)


SCHEMAS: dict[type[Event], pa.Schema] = {cls: schema_of(cls) for cls in EVENT_TYPES}

HINTS: dict[type[Event], dict[str, Any]] = {cls: get_type_hints(cls) for cls in EVENT_TYPES}


def is_json(cls: type[Event], name: str) -> bool:
    """Whether a field is written as JSON text."""
    hint = HINTS[cls][name]
    return get_origin(hint) is dict and get_args(hint)[1] is Any


def to_json(value: Any) -> str:
    return msgspec.json.encode(value).decode()


TRACE = pa.schema(
    [
        ("process", INT),
        ("file", TEXT),
        ("role", TEXT),
        ("pid", INT),
        ("host", TEXT),
        ("rank", INT),
        ("level", TEXT),
        ("tokens", pa.bool_()),
        ("vllm", TEXT),
        ("vllm_trace", TEXT),
        ("schema", INT),
        ("monotonic_ns", INT),
        ("unix_ns", INT),
        ("num_events", INT),
        ("dropped", INT),
        ("truncated", TEXT),
        ("problems", pa.list_(TEXT)),
    ]
)
"""One row for each process: ``unix_ns - monotonic_ns`` turns ``at_ns`` into the time of day;
``truncated`` is null for a whole file."""
