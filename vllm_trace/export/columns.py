"""Events to columns, one event after the other: any trace, any machine, and the measure of ``fast``.

A *chunk* is what some thousand events in a row become: for each kind of event that is among them, a
batch of rows with the columns of ``tables.SCHEMAS``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import msgspec
import pyarrow as pa

from vllm_trace.errors import TraceError
from vllm_trace.events import Event, StepScheduled, StepUpdated
from vllm_trace.export.tables import PLACE, SCHEMAS, is_json, to_json
from vllm_trace.trace import Record, Trace, time_of

CHUNK = 16_384
"""Events of a chunk."""

Chunk = dict[type[Event], pa.RecordBatch]
Place = tuple[int, int, int | None, int | None]
"""Values of ``tables.PLACE``."""

MARKS = (StepScheduled, StepUpdated)
"""What happened inside these calls stands before them."""


def chunks(trace: Trace, tokens: bool = False, after: int = 0) -> Iterator[Chunk]:
    """The trace in chunks from the event after number ``after`` on; holds two of them.

    An event waits at most a chunk for the step and the time that its process tells next.
    """
    records = islice(trace.records(), after, None)
    waiting: list[Record] = []
    places: list[list[int | None]] = []
    while True:
        upcoming = list(islice(records, CHUNK))
        steps, times, first = _filled(upcoming)
        for row, record in enumerate(waiting):
            for what in (0, 1):
                if places[what][row] is None:
                    places[what][row] = first[what].get(record.process)
        if waiting:
            yield _chunk(waiting, places[0], places[1], tokens)
        if not upcoming:
            return
        waiting, places = upcoming, [steps, times]


def _filled(records: list[Record]) -> tuple[list[Any], list[Any], tuple[dict, dict]]:
    """Steps and times of the rows, and the first of each that a process tells, from the end back."""
    steps: list[int | None] = [None] * len(records)
    times: list[int | None] = [None] * len(records)
    next_step: dict[int, int] = {}
    next_time: dict[int, int] = {}
    for row in range(len(records) - 1, -1, -1):
        _, process, event = records[row]
        if type(event) in MARKS:
            next_step[process] = event.step  # type: ignore[attr-defined]
        own = getattr(event, "step", None)
        steps[row] = next_step.get(process) if own is None else own
        at = time_of(event)
        if at is not None:
            next_time[process] = at
        times[row] = next_time.get(process)
    return steps, times, (next_step, next_time)


def _chunk(
    records: list[Record], steps: Sequence[Any], times: Sequence[Any], tokens: bool
) -> Chunk:
    found: dict[type[Event], tuple[list[Place], list[Event]]] = {}
    for (number, process, event), step, at in zip(records, steps, times):
        rows = found.get(type(event))
        if rows is None:
            rows = found[type(event)] = ([], [])
        rows[0].append((number, process, step, at))
        rows[1].append(event)
    return {cls: _batch(cls, *rows, tokens) for cls, rows in found.items()}


def _batch(
    cls: type[Event], places: list[Place], events: list[Event], tokens: bool
) -> pa.RecordBatch:
    columns = [_array(cls, name, column, pa.int64()) for name, column in zip(PLACE, zip(*places))]
    columns += own_columns(cls, events, tokens)
    return pa.record_batch(columns, schema=SCHEMAS[cls])


def own_columns(cls: type[Event], events: Sequence[Event], tokens: bool) -> list[pa.Array]:
    """The columns of an event's own fields.

    Raises: ``TraceError`` for a number that no column can hold.
    """
    made = []
    for field in list(SCHEMAS[cls])[4:]:
        values = [getattr(event, field.name) for event in events]
        if field.name == "token_ids" and not tokens:
            values = [None] * len(values)
        elif is_json(cls, field.name):
            values = [*map(to_json, values)]
        elif pa.types.is_map(field.type):
            values = [list(value.items()) for value in values]
        elif field.name == "groups":
            values = msgspec.to_builtins(values)
        made.append(_array(cls, field.name, values, field.type))
    return made


def _array(cls: type[Event], name: str, values: Sequence[Any], kind: pa.DataType) -> pa.Array:
    try:
        return pa.array(values, kind)
    except (pa.ArrowInvalid, OverflowError) as error:
        raise TraceError(
            f"a {cls.kind} has a number in {name} that no engine has: {error}"
        ) from None
