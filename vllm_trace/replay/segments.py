"""A trace cut where ``mini`` and vLLM can be compared: after each schedule and each answer.

Facts of a call stand before the call in a trace ("inner before outer"), and the calls of one step
before ``step.scheduled`` or ``step.updated``. So the events of a scheduler fall into segments, each
of which ends with one of those two; a whole step may be one segment.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from vllm_trace.events import (
    AttentionCalled,
    AttentionPlanned,
    BackendSelected,
    EngineConfigured,
    Event,
    RequestSeen,
    SlotsMapped,
    StepExecuted,
    StepSampled,
    StepScheduled,
    StepUpdated,
    TableRowChanged,
)
from vllm_trace.trace import Trace

ENDS = frozenset({StepScheduled, StepUpdated})
ALONE = frozenset({EngineConfigured, BackendSelected})
"""An engine begins with the first; the second is told before there is one."""
OF_WORKERS = frozenset(
    {TableRowChanged, SlotsMapped, AttentionPlanned, AttentionCalled, StepExecuted, StepSampled}
    | {RequestSeen}
)
COMPARED_OF_WORKERS = frozenset({TableRowChanged, SlotsMapped})
"""Those of them that say something of blocks."""


class Segment(NamedTuple):
    """Events of one process in their order."""

    numbers: Any
    """Of the events: a range, or a list."""
    process: int
    events: list[Event]
    kinds: list[type[Event]]


def segments(trace: Trace, stretch: int = 1) -> Iterator[Segment]:
    """Every event of a trace once, in segments.

    Events of workers in another process are segments of their own; in the scheduler's process they
    stand between a schedule and its answer and stay there. Of a single process whole steps may go
    together, up to about ``stretch`` events: what a segment costs is then shared by many steps.
    """
    one = type(trace) is Trace and len(trace.files) == 1
    return _of_one_process(trace, stretch) if one else _of_several(trace)


def _of_several(trace: Trace) -> Iterator[Segment]:
    waiting: dict[int, Segment] = {}  # by process: several schedulers may run side by side
    for number, process, event in trace.records():
        kind = type(event)
        if kind in OF_WORKERS:
            yield Segment([number], process, [event], [kind])
            continue
        if kind in ALONE and process in waiting:
            yield waiting.pop(process)
        segment = waiting.setdefault(process, Segment([], process, [], []))
        segment.numbers.append(number)
        segment.events.append(event)
        segment.kinds.append(kind)
        if kind in ENDS or kind in ALONE:
            yield waiting.pop(process)
    yield from waiting.values()


def _of_one_process(trace: Trace, stretch: int) -> Iterator[Segment]:
    """The same from whole batches: where a batch is one step, as a recorder writes it, so is the segment."""
    first = 1
    steps: list[Event] = []
    kinds: list[type[Event]] = []
    waiting: list[Event] = []
    trace.names.clear()
    for batch in trace.files[0].batches():
        events = waiting + batch if waiting else batch
        if not events:
            continue  # whatever was captured made no event
        new = [type(event) for event in events]
        whole = new[-1] is StepUpdated and ALONE.isdisjoint(new)
        if whole and stretch == 1:
            whole = new.count(StepUpdated) == 1
        if whole:
            steps += events
            kinds += new
            waiting = []
        if steps and (not whole or len(steps) >= stretch):
            yield Segment(range(first, first + len(steps)), 0, steps, kinds)
            first += len(steps)
            steps, kinds = [], []
        if not whole:
            start = 0
            for cut in _cuts(new):
                numbers = range(first + start, first + cut)
                yield Segment(numbers, 0, events[start:cut], new[start:cut])
                start = cut
            first += start
            waiting = events[start:]
    rest = steps or waiting
    if rest:
        yield Segment(range(first, first + len(rest)), 0, rest, [*map(type, rest)])


def _cuts(kinds: list[type[Event]]) -> list[int]:
    """Behind each schedule and answer, and around what stands alone."""
    cuts: dict[int, None] = {}
    for place, kind in enumerate(kinds):
        if kind in ALONE:
            cuts[place] = cuts[place + 1] = None
        elif kind in ENDS:
            cuts[place + 1] = None
    cuts.pop(0, None)
    return [*cuts]
