"""A trace as spans: one trace for each request, one for each engine step.

``spans(trace)`` reads a trace once; ``SpanFold`` takes the batches of any number of processes as
they come, from files that are whole or still growing. Only the order within a process counts:
what a worker tells of a step is put to it by the step's number. Ids are made from what the trace
says, so the same trace gives the same ids in every export.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from typing import Any

from vllm_trace.events import (
    AttentionCalled,
    AttentionPlanned,
    BackendSelected,
    BlockEvicted,
    BlocksCached,
    BlocksFreed,
    BlocksTaken,
    BlocksTouched,
    EngineConfigured,
    EngineStopped,
    Event,
    KVEventsTaken,
    PrefixCacheReset,
    PrefixLookedUp,
    ProbeFailed,
    RequestArrived,
    RequestFinished,
    RequestFreed,
    RequestPreempted,
    RequestSeen,
    SlotsAllocated,
    SlotsMapped,
    SlotsRefused,
    StepExecuted,
    StepSampled,
    StepScheduled,
    StepUpdated,
    TableRowChanged,
)
from vllm_trace.export import attributes as a
from vllm_trace.export.decodes import MAX_STEPS
from vllm_trace.export.engine_spans import Engine, Sampler
from vllm_trace.export.layers import layer_index
from vllm_trace.export.open_steps import LAG
from vllm_trace.export.span import Emit, Resource, Span, Traceparent
from vllm_trace.trace import Trace, time_of
from vllm_trace.tracefile import TraceFile, decoder_without

MAX_EARLY = 4096
"""Facts of a worker that are kept until its engine is known."""


def every_trace(trace_id: bytes, parent: Traceparent | None) -> bool:
    """The sampler that leaves nothing out."""
    return True


class Process:
    """One file of the trace."""

    def __init__(self, header: dict[str, Any]) -> None:
        self.header = header
        self.host = str(header.get("host", ""))
        self.key = (str(header.get("role", "")), header.get("rank", 0), header.get("pid", 0))
        clock = header.get("clock") or {}
        self.offset = clock.get("unix_ns", 0) - clock.get("monotonic_ns", 0)
        self.identity = (self.host, header.get("pid", 0), clock.get("unix_ns", 0))
        self.resource = Resource(_resource_of(header, self.host))
        self.engine: Engine | None = None
        """Of its own scheduler."""
        self.home: Engine | None = None
        """Of the scheduler that it works for."""
        self.early: list[Any] = []
        self.backends: dict[int, str] = {}

    def offset_for(self, engine: Engine) -> int:
        """Of one host all processes have one clock: then the engine's offset is the one that counts."""
        return engine.offset if self.host == engine.host else self.offset

    def note_model(self, model: str) -> None:
        if model and self.resource.attributes.get(a.MODEL) != model:
            self.resource = Resource(self.resource.attributes | {a.MODEL: model})


def _resource_of(header: dict[str, Any], host: str) -> dict[str, Any]:
    pid = header.get("pid", 0)
    made = {
        a.SERVICE_NAME: "vllm",
        a.SERVICE_VERSION: header.get("vllm", ""),
        a.SERVICE_INSTANCE: f"{host}:{pid}",
        a.HOST_NAME: host,
        a.PROCESS_PID: pid,
        a.RUNTIME_NAME: "cpython" if header.get("python") else "",
        a.RUNTIME_VERSION: header.get("python", ""),
        a.DISTRO_NAME: "vllm_trace",
        a.DISTRO_VERSION: header.get("vllm_trace", ""),
        a.VLLM: header.get("vllm", ""),
        a.ROLE: header.get("role", ""),
        a.RANK: header.get("rank", 0),
        a.LEVEL: header.get("level", ""),
        a.PLATFORM: header.get("platform", ""),
    }
    return {name: value for name, value in made.items() if value != ""}


class SpanFold:
    """Spans of a trace from its batches. Finished ones go to ``emit``, or wait in ``made``."""

    def __init__(
        self,
        sampler: Sampler = every_trace,
        *,
        emit: Emit | None = None,
        detail: bool = False,
        tokens: bool = False,
        max_steps: int = MAX_STEPS,
        lag: int = LAG,
    ) -> None:
        self.made: list[Span] = []
        self.emit: Emit = emit or self._keep
        """Gets each finished span; of engines that are not known yet it can still be changed."""
        self.engines: list[Engine] = []
        self.num_events = 0
        self.processes: list[Process] = []
        self._options: dict[str, Any] = {
            "detail": detail,
            "tokens": tokens,
            "max_steps": max_steps,
            "lag": lag,
        }
        self._sampler = sampler

    @property
    def num_requests(self) -> int:
        return sum(engine.num_requests for engine in self.engines)

    @property
    def num_unsampled(self) -> int:
        return sum(engine.num_unsampled for engine in self.engines)

    @property
    def num_late(self) -> int:
        return sum(engine.steps.late for engine in self.engines)

    def open(self, header: dict[str, Any]) -> Process:
        """A process whose batches will come."""
        process = Process(header)
        self.processes.append(process)
        return process

    def feed(self, process: Process, events: list[Event]) -> None:
        """Take in some events of a process, in its order."""
        self.num_events += len(events)
        engine = process.engine
        event: Any
        for event in events:
            kind = type(event)
            method = _ENGINE.get(kind)
            if method is not None:
                if engine is None:
                    engine = self._new_engine(process)
                method(engine, event)
            elif kind in _WORKER:
                home = engine or process.home or self._home_of(process)
                if home is None:
                    if len(process.early) < MAX_EARLY:
                        process.early.append(event)
                else:
                    home.worked(process, event)
            elif kind is BackendSelected:
                process.backends[layer_index(event.layer)] = event.backend
            elif kind is EngineConfigured:
                engine = engine or self._new_engine(process)
                engine.configured(event)
                self._configured(process, event)
            elif kind is RequestSeen and process.home is None and engine is None:
                self._find_home(process, event.request_id)

    def _keep(self, *fields: Any) -> None:
        span = Span(*fields)
        span.events = [*span.events]  # the log that they may lie in goes on
        self.made.append(span)

    def take(self) -> list[Span]:
        """The spans that are finished, each once."""
        made = self.made[:]
        self.made.clear()
        return made

    def idle(self) -> None:
        """Nothing comes for now: emit steps that wait only for what may still come."""
        for engine in self.engines:
            engine.settle_steps()

    def end(self) -> None:
        """The trace is over."""
        for process in self.processes:
            if process.early and process.home is None:
                # No scheduler is in this trace: the worker's steps stand alone.
                self._adopt(process, self.engines[0] if self.engines else self._new_engine(process))
        for engine in self.engines:
            engine.end()

    # Who belongs to whom --------------------------------------------------------------

    def _new_engine(self, process: Process) -> Engine:
        light = process.header.get("level") == "light"
        engine = Engine(
            process.identity, process.resource, process.offset, light, self.emit,
            self._sampler, host=process.host, **self._options,
        )  # fmt: skip
        process.engine = engine
        self.engines.append(engine)
        return engine

    def _configured(self, process: Process, event: EngineConfigured) -> None:
        assert process.engine is not None
        process.note_model(str(event.settings.get("model", "")))
        process.engine.resource = process.resource

    def _home_of(self, process: Process) -> Engine | None:
        """The engine that a worker works for, when there is but one."""
        if len(self.engines) != 1:
            return None
        return self._adopt(process, self.engines[0])

    def _find_home(self, process: Process, request_id: str) -> None:
        """Of several engines, the one that has the worker's request."""
        for engine in self.engines:
            if len(self.engines) == 1 or engine.sees(request_id):
                self._adopt(process, engine)
                return

    def _adopt(self, process: Process, engine: Engine) -> Engine:
        process.home = engine
        process.note_model(engine.resource.attributes.get(a.MODEL, ""))
        for event in process.early:
            engine.worked(process, event)
        process.early.clear()
        return engine


_ENGINE: dict[type, Callable[[Engine, Any], None]] = {
    RequestArrived: Engine.arrived,
    RequestFinished: Engine.finished,
    RequestPreempted: Engine.preempted,
    RequestFreed: Engine.freed,
    PrefixLookedUp: Engine.looked_up,
    SlotsAllocated: Engine.allocated,
    SlotsRefused: Engine.refused,
    BlocksCached: Engine.cached,
    BlocksFreed: Engine.freed_blocks,
    BlockEvicted: Engine.evicted,
    PrefixCacheReset: Engine.reset,
    StepScheduled: Engine.scheduled,
    StepUpdated: Engine.updated,
}
_LEFT_OUT = (
    BlocksTaken, BlocksTouched, TableRowChanged, SlotsMapped, ProbeFailed, KVEventsTaken, EngineStopped,
)  # fmt: skip
_decode = decoder_without(*_LEFT_OUT)
_WORKER = frozenset((StepExecuted, StepSampled, AttentionPlanned, AttentionCalled))


def spans(trace: Trace, fold: SpanFold | None = None) -> Iterator[Span]:
    """Every span of a trace, children before their root."""
    fold = fold or SpanFold()
    for _ in read(trace, fold):
        yield from fold.take()


def read(trace: Trace, fold: SpanFold) -> Iterator[None]:
    """Feed the fold with the whole trace, and stop now and then for what it has emitted."""
    processes = [fold.open(file.header) for file in trace.files]
    for index, events in batches(trace.files):
        fold.feed(processes[index], events)
        yield
    fold.end()
    yield


def batches(files: list[TraceFile]) -> Iterator[tuple[int, list[Event]]]:
    """(file, events) of all files, merged by when each batch began; one batch of each is held."""
    if len(files) == 1:
        for events in files[0].batches(_decode):
            yield 0, events
        return
    heap: list[tuple[int, int, list[Event], Iterator[list[Event]]]] = []
    for index, file in enumerate(files):
        stream = file.batches(_decode)
        for events in stream:
            heap.append((_begin_of(events, 0), index, events, stream))
            break
    heapq.heapify(heap)
    while heap:
        at, index, events, stream = heap[0]
        yield index, events
        following = next(stream, None)
        if following is None:
            heapq.heappop(heap)
        else:
            heapq.heapreplace(heap, (_begin_of(following, at), index, following, stream))


def _begin_of(events: list[Event], last: int) -> int:
    for event in events:
        at = time_of(event)
        if at is not None:
            return max(at, last)
    return last
