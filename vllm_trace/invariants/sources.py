"""What ``check`` can read: a trace, or events at hand."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

from vllm_trace.events import Event
from vllm_trace.trace import Record, Trace


class Source(Protocol):
    """What ``check`` reads: a ``Trace``, or an ``EventList``."""

    names: dict[int, str]

    def records(self) -> Iterator[Record]: ...

    @property
    def header(self) -> dict[str, Any]: ...

    @property
    def level(self) -> str: ...

    @property
    def problems(self) -> list[str]: ...


class EventList:
    """Events at hand, as a trace: for tests of a rule, and of an engine without a model.

    ``events`` are events, or ``(process, event)``; they are read again for a story.
    """

    def __init__(
        self,
        events: Sequence[Any],
        header: dict[str, Any] | None = None,
        problems: Sequence[str] = (),
        names: dict[int, str] | None = None,
    ) -> None:
        self.given = events
        self.header = header or {}
        self.problems = list(problems)
        self.names: dict[int, str] = dict(names or {})

    @property
    def level(self) -> str:
        return str(self.header.get("level", "full"))

    def records(self) -> Iterator[Record]:
        for number, given in enumerate(self.given, 1):
            process, event = given if type(given) is tuple else (0, given)
            name = getattr(event, "request_id", None)
            if name is not None:
                self.names[event.request] = name
            yield Record(number, process, event)


def is_one_process(trace: Source) -> bool:
    return type(trace) is Trace and len(trace.files) == 1


def batches(trace: Source) -> Iterator[tuple[int, Iterable[Event]]]:
    """(process, events) in the order of ``records``; whole batches where one process told all."""
    if isinstance(trace, Trace) and is_one_process(trace):
        for batch in trace.files[0].batches():
            yield 0, batch
    else:
        for _, process, event in trace.records():
            yield process, (event,)
