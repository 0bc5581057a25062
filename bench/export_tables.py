"""How fast a trace becomes tables, JSON lines and a timeline, and in how much memory.

The traces are grown from real ones, and written as a recorder writes them: a copy of all events
after the other, each with requests, steps and times of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vllm_trace.events import (
    BackendSelected,
    EngineConfigured,
    Event,
    RequestArrived,
    StepScheduled,
    StepUpdated,
)
from vllm_trace.trace import REQUEST_LISTS, time_of
from vllm_trace.tracefile import TraceFile, TraceWriter

ONCE = (EngineConfigured, BackendSelected)
"""What a process tells when it starts."""


def grown(path: Path, num_events: int, made: Path) -> Path:
    """A file of at least ``num_events``, with the events of ``path`` as often as it takes."""
    source = TraceFile(path)
    whole = list(source.batches())
    flat = [event for batch in whole for event in batch]
    requests = 1 + max(event.request for event in flat if type(event) is RequestArrived)
    steps = max(event.step for event in flat if type(event) is StepScheduled)
    times = [at for at in map(time_of, flat) if at is not None]
    span = max(times) - min(times) + 1_000_000
    writer, count, copy = TraceWriter(made, source.header), 0, 0
    before: dict[str, Any] = {}
    while count < num_events:
        for batch in source.batches():
            shifted = [*_shifted(batch, copy, copy * requests, copy * steps, copy * span, before)]
            if shifted:
                writer.write(shifted)
            count += len(shifted)
        copy += 1
    writer.close({"dropped": 0, "failures": {}})
    return made


def _shifted(
    batch: list[Event], copy: int, requests: int, steps: int, span: int, before: dict[str, Any]
) -> Iterator[Event]:
    for event in batch:
        if copy and isinstance(event, ONCE):
            continue
        fields = event.__struct_fields__
        if "request" in fields:
            event.request += requests
        for name in REQUEST_LISTS:
            if name in fields:
                setattr(event, name, [number + requests for number in getattr(event, name)])
        if "step" in fields:
            event.step += steps
        for name in ("at_ns", "started_ns", "forward_ns"):
            at = getattr(event, name, None)
            if at is not None:
                setattr(event, name, [a + span for a in at] if type(at) is list else at + span)
        if type(event) is RequestArrived:
            event.request_id = f"{event.request_id}-{copy}" if copy else event.request_id
        elif type(event) is StepScheduled:
            # What a recorder leaves out because it is as in the last step.
            for name in ("requests", "num_tokens"):
                own = getattr(event, name)
                if own == before.get(name):
                    setattr(event, name, None)
                before[name] = own
        elif type(event) is StepUpdated and event.num_output_tokens is not None:
            if all(number == 1 for number in event.num_output_tokens):
                event.num_output_tokens = None
        yield event
