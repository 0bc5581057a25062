"""Events of the steps that decode, once for all requests in them."""

from __future__ import annotations

from vllm_trace.export.span import SpanEvent


class StepLog:
    """Grows at its end and is forgotten from its beginning.

    A request's decode is a range of places in it. What lies before every open range is forgotten.
    """

    def __init__(self) -> None:
        self.events: list[SpanEvent] = []
        self.begin = 0

    @property
    def end(self) -> int:
        return self.begin + len(self.events)

    def append(self, event: SpanEvent) -> int:
        self.events.append(event)
        return self.end - 1

    def at(self, place: int) -> SpanEvent | None:
        return self.events[place - self.begin] if place >= self.begin else None

    def slice(self, begin: int, end: int) -> list[SpanEvent]:
        return self.events[begin - self.begin : end - self.begin]

    def forget(self, before: int) -> None:
        count = min(before - self.begin, len(self.events))
        if count > 0:
            del self.events[:count]
            self.begin += count
